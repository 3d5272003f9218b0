"""Latents against pixels: time and memory of a training step of a config's U-Net on its latents and on images.

    python benchmarks/pixel_space.py configs/faces512.yaml [batch size] [smaller image sizes ...]

Each case runs in its own process: forward, backward and AdamW, the fastest of three steps. Peak of GPU memory, or of the
whole process on a CPU (torch itself uses about 0.4 GB). "nan": the run failed; its error is printed. Gradient checkpointing
as in the config.
"""

import subprocess
import sys
from pathlib import Path

import timing  # puts the project on the path
from timing import machine, print_table

from utils.settings import load_config

SCRIPT = """
import resource, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import torch
from timing import DEVICE, wait
from models.schedules import make_schedule
from utils.settings import load_config
from train_diffusion import build_unet, diffusion_loss
from utils.device import autocast, pick_precision
config, channels, size, batch = {config!r}, *map(int, sys.argv[1:])
cfg = load_config(config).diffusion
net = build_unet(cfg, channels, size, None).to(DEVICE, memory_format=torch.channels_last)
net.grad_checkpointing = cfg.grad_checkpointing
optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
schedule = make_schedule(cfg.schedule)
z, t = torch.randn(batch, channels, size, size, device=DEVICE), torch.randint(0, 1000, (batch,), device=DEVICE)
seconds = []
for _ in range(3):
    wait()
    started = time.perf_counter()
    with autocast(DEVICE, pick_precision("auto", DEVICE)):
        loss = diffusion_loss(net, z, torch.randn_like(z), t, schedule, cfg.prediction).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
    seconds.append(time.perf_counter() - started)
peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("result", min(seconds), peak)
"""


def measure_step(config: str, channels: int, size: int, batch: int) -> tuple[float, float]:
    """Seconds and bytes; NaN if the step fails, after printing its error."""
    code = SCRIPT.format(root=str(Path(timing.__file__).parent.parent), config=config)
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, (channels, size, batch))], capture_output=True, text=True
    )
    if process.returncode:
        print((process.stderr.strip().splitlines() or [f"ended by signal {-process.returncode}"])[-1], file=sys.stderr)
        return float("nan"), float("nan")
    return tuple(map(float, process.stdout.split("result ")[-1].split()))


def main(path: str, batch: str = "1", *smaller: str) -> None:
    config = load_config(path)
    latent_size = config.data.image_size // config.vae.downsampling
    latents = measure_step(path, config.vae.latent_channels, latent_size, int(batch))
    name = f"latents, {latent_size}x{latent_size}x{config.vae.latent_channels}"
    rows = [[name, f"{latents[0]:.2f}", f"{latents[1] / 1e9:.2f} GB", "", ""]]
    for size in [*map(int, smaller), config.data.image_size]:
        seconds, peak = measure_step(path, 3, size, int(batch))
        ratios = f"{seconds / latents[0]:.1f}", f"{peak / latents[1]:.1f}"
        rows.append([f"pixels, {size}x{size}x3", f"{seconds:.2f}", f"{peak / 1e9:.2f} GB", *ratios])
    print(f"\ntraining step of the U-Net of {path}, batch {batch}, {machine()}\n")
    print_table(["", "seconds", "peak memory", "seconds / latents'", "memory / latents'"], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
