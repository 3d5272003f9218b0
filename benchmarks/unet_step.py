"""Time of a training step: celeba64's U-Net against networks of similar size in diffusers and denoising-diffusion-pytorch.

    python benchmarks/unet_step.py [batch size] [repeats]

A step is forward, backward, gradient clipping, AdamW and EMA. Ours: bf16 autocast if the hardware supports it,
channels_last, fused AdamW, foreach EMA. Peers (a): as their own scripts run, float32, default AdamW, their EMA. Peers (b):
with our precision, memory format, optimizer and EMA.
"""

import sys

from timing import DEVICE, flops_of, interleaved, machine, peak_flops, print_table  # before torch

# isort: split
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from config import DiffusionConfig
from models.schedules import make_schedule
from models.unet import UNet
from train_diffusion import build_unet, diffusion_loss
from training.optim import EMA
from utils.device import autocast, missing_compiler, num_params, pick_precision

CHANNELS, SIZE = 8, 16


def make_step(net, predict, dtype, ours: bool, batch: int):
    """Return a function that runs one training step of `net`; predict(net, z_t, t) -> eps."""
    memory_format = torch.channels_last if ours else torch.contiguous_format
    net.to(DEVICE, memory_format=memory_format).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True if ours else None)
    ema = EMA(net, 0.9999) if ours else EMAModel(net.parameters(), decay=0.9999)
    schedule = make_schedule("cosine")
    z = torch.randn(batch, CHANNELS, SIZE, SIZE, device=DEVICE)
    count = 0

    def step():
        nonlocal count
        eps, t = torch.randn_like(z), torch.randint(0, 1000, (batch,), device=DEVICE)
        with autocast(DEVICE, dtype):
            if isinstance(net, UNet):
                loss = diffusion_loss(net, z, eps, t, schedule, "eps").mean()
            else:
                z_t = schedule.add_noise(z, eps, t)
                loss = F.mse_loss(predict(net, z_t.contiguous(memory_format=memory_format), t).float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(count) if ours else ema.step(net.parameters())
        count += 1

    return step


def diffusers_net() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=2, block_out_channels=(128, 256, 320),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64, dropout=0.1,
    )  # fmt: skip


def peers() -> dict:
    """name -> (function that builds a network, predict)"""
    networks = {"diffusers": (diffusers_net, lambda net, z_t, t: net(z_t, t).sample)}
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError:
        print("denoising-diffusion-pytorch is not installed, skipped", file=sys.stderr)
    else:
        build = lambda: Unet(dim=144, dim_mults=(1, 2, 3), channels=CHANNELS, dropout=0.1, flash_attn=False)  # noqa: E731
        networks["denoising-diffusion-pytorch"] = (build, lambda net, z_t, t: net(z_t, t))
    return networks


def main(batch: int = 64, repeats: int = 7) -> None:
    dtype = pick_precision("auto", DEVICE)
    torch.manual_seed(0)
    ours = build_unet(DiffusionConfig(), CHANNELS, SIZE, None)
    runs, sizes = {"ours": make_step(ours, None, dtype, True, batch)}, {"ours": num_params(ours)}
    if not missing_compiler(DEVICE):
        compiled = UNet(**ours.settings)
        compiled.compile(dynamic=False)
        runs["ours, compiled"], sizes["ours, compiled"] = make_step(compiled, None, dtype, True, batch), num_params(compiled)
    for name, (build, predict) in peers().items():
        for kind, precision, like_ours in (("(a)", torch.float32, False), ("(b)", dtype, True)):
            net = build()
            sizes[f"{name} {kind}"] = num_params(net)
            runs[f"{name} {kind}"] = make_step(net, predict, precision, like_ours, batch)
    peak = peak_flops(dtype)
    # Counting operations would prevent compilation (torch before 2.14).
    flops = {name: flops_of(run) for name, run in runs.items() if name != "ours, compiled"}
    flops["ours, compiled"] = flops["ours"]
    seconds = interleaved(runs, repeats)
    print(f"training step at batch {batch}, {machine()}; peak {str(dtype)[6:]} matrix product {peak / 1e12:.2f} TFLOP/s\n")
    print_table(
        ["", "parameters", "ms", "images/s", "time / ours", "GFLOP", "of peak"],
        [[name, f"{sizes[name] / 1e6:.1f}M", f"{1000 * t:.0f}", f"{batch / t:.0f}", f"{t / seconds['ours']:.2f}", f"{flops[name] / 1e9:.0f}",
          f"{flops[name] / t / peak:.0%}"] for name, t in seconds.items()],
    )  # fmt: skip
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        runs["ours"]()
        print(
            f"\nmemory of our step: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB (all networks of this script included)"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
