"""Time of a training step, encoding and decoding: celeba64's VAE against diffusers' AutoencoderKL with the same settings.

    python benchmarks/vae_step.py [batch size] [repeats]

Both compute the same function. The loss is MSE + KL, without a perceptual network. Peer (a): float32, defaults. Peer (b):
with our precision, memory format and optimizer.
"""

import sys

from timing import DEVICE, flops_of, interleaved, machine, peak_flops, print_table  # before torch

# isort: split
import torch
from diffusers import AutoencoderKL

from config import VAEConfig
from models.vae import VAE
from training.optim import EMA
from utils.device import autocast, num_params, pick_precision
from utils.diffusers_format import vae_config

SIZE = 64


def stages(net, dtype, ours: bool, batch: int) -> dict:
    """Functions to time: a training step, encoding, decoding."""
    memory_format = torch.channels_last if ours else torch.contiguous_format
    net.to(DEVICE, memory_format=memory_format).train()
    optimizer, ema = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True if ours else None), EMA(net, 0.999)
    x = (torch.rand(batch, 3, SIZE, SIZE, device=DEVICE) * 2 - 1).contiguous(memory_format=memory_format)
    count = 0

    def step():
        nonlocal count
        with autocast(DEVICE, dtype):
            if isinstance(net, VAE):
                y, posterior = net(x)
                kl = posterior.kl().mean()
            else:
                posterior = net.encode(x).latent_dist
                y, kl = net.decode(posterior.sample()).sample, posterior.kl().mean() / posterior.mean[0].numel()
            loss = (y.float() - x).square().mean() + 1e-6 * kl.float()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(count)
        count += 1

    @torch.no_grad()
    def encode():
        with autocast(DEVICE, dtype):
            return net.encode(x).mean if isinstance(net, VAE) else net.encode(x).latent_dist.mean

    z = encode().float()

    @torch.no_grad()
    def decode():
        with autocast(DEVICE, dtype):
            return net.decode(z) if isinstance(net, VAE) else net.decode(z).sample

    return {"training step": step, "encode": encode, "decode": decode}


def main(batch: int = 32, repeats: int = 7) -> None:
    dtype, cfg = pick_precision("auto", DEVICE), VAEConfig()
    torch.manual_seed(0)
    ours = VAE(
        channels=cfg.channels,
        num_res_blocks=cfg.num_res_blocks,
        latent_channels=cfg.latent_channels,
        attention=cfg.attention,
    )
    peers = {f"diffusers ({kind})": AutoencoderKL(**vae_config(ours.settings, SIZE)) for kind in "ab"}
    nets = {"ours": ours, **peers}
    timed = {name: stages(net, torch.float32 if name.endswith("(a)") else dtype, not name.endswith("(a)"), batch) for name, net in nets.items()}  # fmt: skip
    peak = peak_flops(dtype)
    print(
        f"batch {batch} at {SIZE}x{SIZE}, {machine()}; peak of a {str(dtype)[6:]} matrix product {peak / 1e12:.2f} TFLOP/s\n"
    )
    rows = []
    for stage in ("training step", "encode", "decode"):
        seconds = interleaved({name: timed[name][stage] for name in nets}, repeats)
        for name, t in seconds.items():
            flops = flops_of(timed[name][stage])
            rows.append([stage, name, f"{num_params(nets[name]) / 1e6:.2f}M", f"{1000 * t:.0f}", f"{batch / t:,.0f}",
                         f"{t / seconds['ours']:.2f}", f"{flops / 1e9:.0f}", f"{flops / t / peak:.0%}"])  # fmt: skip
    print_table(["", "", "parameters", "ms", "images/s", "time / ours", "GFLOP", "of peak"], rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
