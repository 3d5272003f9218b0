"""What the stages need beside the science: device and precision, memory, learning rate, EMA."""

import copy
import functools
import math
import os
import platform

import torch
from torch import nn

from config import Perceptual, Training
from lab import parallel
from lab.artifacts import first_line
from lab.errors import UserError
from lab.feed import free_memory
from models.losses import make_perceptual, perceptual_weights

# float32 weights, EMA, gradients and AdamW's two moments while training; on the disk two states (old and new) and a weights file
TRAINING_BYTES, STATE_BYTES = 20, 40  # per parameter


def pick_device(name: str) -> torch.device:
    """auto -> cuda, else mps, else cpu. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and parallel.size() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {device} asked for, and torch finds {torch.cuda.device_count()} CUDA devices here; use device=auto or device=cpu"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are of the current device
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # Hopper's default; NaN gradients under some masks (pytorch#196678)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps asked for, and torch finds none here; use device=auto or device=cpu")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """auto -> bfloat16 where the hardware multiplies it (CUDA >= 8.0, CPUs with AMX or AVX512-BF16), else float32."""
    torch.backends.cudnn.allow_tf32 = name != "float32"  # asked for by name: then no TF32 in convolutions either
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in dtype, the rest in float32; nothing at all for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_networks(setting: str | bool, device: torch.device, *networks: nn.Module) -> None:
    """torch.compile in place, where the setting asks for it and this machine can; says in one line where it cannot."""
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return
    why = missing_compiler(device)
    if why:
        print(f"note: nothing is compiled, as torch.compile fails here: {why}")
        return
    # Modules share the cache of what was compiled, and each adds an entry for training, for evaluation and for a last batch.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = 256, 1024
    for network in networks:
        network.compile(dynamic=False)  # batches have one size; a smaller last one is compiled once more


@functools.cache
def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile has against this machine: a missing C++ compiler, or no Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of a dozen kinds, from three packages
        return first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """cuDNN, cuBLAS, Triton, Inductor and CPUs have errors of their own for it."""
    texts = "out of memory", "unable to find an engine", "ALLOC_FAILED", "can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(t in str(error) for t in texts)
    )


def load_perceptual(p: Perceptual, device: torch.device) -> nn.Module | None:
    """The perceptual distance of these settings, frozen: images (B, 3, H, W) in [-1, 1], twice -> (B,). Raises UserError naming the ways out
    where its weights are missing."""
    if p.net == "none":
        return None
    try:
        return make_perceptual(p.net, perceptual_weights(p.net, p.weights)).to(device, memory_format=torch.channels_last)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def parameters_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def require_memory(device: torch.device, needed_bytes: int) -> None:
    """Raise UserError if the device has less free memory than this, which leaves activations out."""
    free = free_memory(device)
    if needed_bytes > free:
        raise UserError(
            f"{needed_bytes / 1e6:,.0f} MB of memory are needed on {device} before any activation, and {free / 1e6:,.0f} MB are free: "
            f"use smaller widths"
        )


def learning_rate(settings: Training, step: int, minutes: float = 0.0) -> float:
    """Linear warm-up to lr, then lr, or a cosine down to lr/10 at the last step or minute, whichever is nearer its end."""
    rate = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.lr_decay == "cosine":
        progress = min(1.0, max(0, step - settings.warmup) / max(1, settings.steps - settings.warmup))
        if settings.max_minutes is not None:
            progress = max(progress, min(1.0, minutes / settings.max_minutes))
        rate *= 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
    return rate


class EMA:
    """Exponential moving average of a network's parameters, in `.net`; the decay of update n is min(decay, (1+n)/(10+n))."""

    def __init__(self, net: nn.Module, decay: float):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay
        self._pairs = list(self.net.parameters()), list(net.parameters())

    @torch.no_grad()
    def update(self, n: int) -> None:
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self._pairs[0], self._pairs[1], 1 - decay)


def hardware(device: torch.device) -> str:
    """For the records of what was made or measured on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
