"""Device and precision selection, torch.compile, and memory checks."""

import functools
import os
import platform

import psutil
import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import UserError
from utils.files import first_line

TRAIN_BYTES_PER_PARAM = 20  # float32 weights, EMA, gradient and AdamW's two moments
STATE_BYTES_PER_PARAM = 40  # on disk: state.pt (16) and the EMA weights file (4), both twice while they are replaced


def pick_device(name: str) -> torch.device:
    """Return the device. "auto" means cuda if available, else mps, else cpu. With torchrun, cuda is the local rank's GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps is not available: use device=auto or device=cpu")
    if device.type == "cuda":
        if distributed.world_size() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"device={device} is not available: torch finds {torch.cuda.device_count()} CUDA devices; "
                f"use device=auto or device=cpu"
            )
        if device.index is not None:
            torch.cuda.set_device(device)  # because CUDA streams and graphs are created on the current device
        # cuDNN attention is the default on Hopper and returns NaN gradients for some masks (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype. Turns off TF32 in cuBLAS, and in cuDNN if `name` is float32.

    "auto" means bfloat16 on GPUs of compute capability >= 8.0 and on CPUs with AMX or AVX512-BF16, else float32.
    """
    torch.backends.cudnn.allow_tf32 = name != "float32"
    # Muon is inaccurate in TF32. The default is False, but NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1.
    torch.backends.cuda.matmul.allow_tf32 = False
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        supported = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        supported = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if supported else torch.float32


def copy_to(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the device. Copies from pageable memory may wait."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_networks(setting: str | bool, device: torch.device, *networks: nn.Module) -> None:
    """Compile networks in place if `setting` is True, or if it is "auto" and the device is CUDA.

    Prints a note if torch.compile does not work on this machine.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return
    problem = missing_compiler(device)
    if problem:
        print(f"note: networks are not compiled because torch.compile fails: {problem}")
        return
    # Dynamo limits the number of recompilations per module class. Many modules have the same class, and each module is
    # compiled separately for training, for evaluation and for a smaller last batch.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 256, 1024
    for network in networks:
        network.compile(dynamic=False)


@functools.cache
def missing_compiler(device: torch.device) -> str | None:
    """Return None if torch.compile works, else its error message (e.g. a C++ compiler or Triton is missing)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # compilers raise many exception types
        return first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. Includes RuntimeErrors of cuDNN, cuBLAS, Triton, Inductor and the CPU allocator."""
    texts = "out of memory", "unable to find an engine", "ALLOC_FAILED", "ALLOCATION_FAILED", "can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def num_params(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def require_memory(device: torch.device, needed_bytes: int) -> None:
    """Check that the device has enough free memory. needed_bytes does not include activations."""
    free = free_memory(device)
    if needed_bytes > free:
        raise UserError(
            f"the network needs {needed_bytes / 1e6:,.0f} MB of memory on {device}, not counting activations, but only "
            f"{free / 1e6:,.0f} MB are free: use fewer channels"
        )


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Return the unused memory of the device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
