"""Time to sample 64 latents with DPM-Solver++(2M): our sampler against diffusers' scheduler and a U-Net of similar size.

    python benchmarks/sample_64.py [steps] [repeats]

VAE decoding is not included. Peer (a): float32, as its pipeline runs. Peer (b): with our precision and memory format.
"""

import sys

from timing import DEVICE, interleaved, machine, print_table  # before torch

# isort: split
import torch
from diffusers import DPMSolverMultistepScheduler
from unet_step import CHANNELS, SIZE, diffusers_net

from config import DiffusionConfig
from models.schedules import make_schedule
from pipeline.cuda_graphs import GraphedForward, cast_weights
from sampling import make_denoiser, sample
from train_diffusion import build_unet
from utils.device import autocast, pick_precision

IMAGES = 64


def main(steps: int = 20, repeats: int = 5) -> None:
    dtype, schedule = pick_precision("auto", DEVICE), make_schedule("linear")
    torch.manual_seed(0)
    net = build_unet(DiffusionConfig(), CHANNELS, SIZE, None).to(DEVICE, memory_format=torch.channels_last).eval()
    for parameter in net.parameters():  # zero-initialized layers would hide the layers before them
        if not parameter.any():
            parameter.data.normal_(std=0.02)
    cast_weights(net, dtype)
    forward = GraphedForward(net) if DEVICE.type == "cuda" else net
    noise = torch.randn(IMAGES, CHANNELS, SIZE, SIZE, device=DEVICE)

    def ours():
        return sample(make_denoiser(forward, schedule, "eps", DEVICE, dtype), noise, schedule, "dpmpp_2m", steps)

    def diffusers_sampler(precision: torch.dtype, memory_format):
        peer = diffusers_net().to(DEVICE, memory_format=memory_format).eval()
        scheduler = DPMSolverMultistepScheduler(
            1000, beta_schedule="linear", timestep_spacing="trailing", final_sigmas_type="zero"
        )

        @torch.no_grad()
        def run():
            scheduler.set_timesteps(steps, device=DEVICE)
            z = noise
            for t in scheduler.timesteps:
                with autocast(DEVICE, precision):
                    eps = peer(z.contiguous(memory_format=memory_format), t).sample
                z = scheduler.step(eps.float(), t, z).prev_sample
            return z

        return run

    runs = {
        "ours": ours,
        "diffusers (a)": diffusers_sampler(torch.float32, torch.contiguous_format),
        "diffusers (b)": diffusers_sampler(dtype, torch.channels_last),
    }
    seconds = interleaved(runs, repeats, warmup=1)
    print(f"{IMAGES} latents, {steps} steps, {machine()}\n")
    print_table(
        ["", "seconds", "time / ours"], [[name, f"{t:.2f}", f"{t / seconds['ours']:.2f}"] for name, t in seconds.items()]
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
