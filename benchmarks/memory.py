"""Peak memory of training with and without gradient checkpointing.

    python benchmarks/memory.py configs/faces512.yaml [section.key=value ...]

Trains both networks of a config for two steps on synthetic faces, each in its own process, with the whole batch at once, the
discriminator from the first step, and no perceptual network unless an override sets one. Peak of GPU memory, or of the
whole process on a CPU (torch itself uses about 0.4 GB). "nan": the run failed; its error is printed.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import timing  # puts the project on the path
from timing import DEVICE, machine, print_table

from utils.settings import load_config

SCRIPT = """
import resource, sys
sys.path.insert(0, {root!r})
import {stage} as stage
assert stage.main(sys.argv[1:]) == 0
import torch
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak)
"""


def measure_peak(stage: str, argv: list[str]) -> float:
    """Bytes; NaN if the stage fails, after printing its error."""
    code = SCRIPT.format(root=str(Path(timing.__file__).parent.parent), stage=stage)
    process = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    if process.returncode:
        print(process.stderr.strip().splitlines()[-1], file=sys.stderr)
        return float("nan")
    return float(process.stdout.split("peak ")[-1])


def main(config_path: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        argv = [config_path, f"runs_dir={folder}", "data.source=synthetic_faces", "data.num_images=160", "data.val_fraction=0.05", "vae.perceptual.net=none",
                "vae.steps=2", "diffusion.steps=2", "diffusion.sample_images=1", "encodings.batch_size=4", "compile=false", "vae.adversarial.start=0", *overrides]  # fmt: skip
        rows, config = [], load_config(config_path, argv[1:])
        for stage, section in (("train_vae", "vae"), ("train_diffusion", "diffusion")):
            if section == "diffusion":
                measure_peak("create_encodings", argv)
            peaks = []
            for on in ("false", "true"):
                name = f"diffusion.name=checkpointing-{on}"
                whole_batch = f"{section}.micro_batch={getattr(config, section).batch_size}"
                if section == "vae":
                    for vae_dir in Path(folder).glob("*/vae"):
                        shutil.rmtree(vae_dir)
                peaks.append(measure_peak(stage, [*argv, name, whole_batch, f"{section}.grad_checkpointing={on}"]))
            rows.append([stage, *(f"{peak / 1e9:.2f} GB" for peak in peaks), f"{peaks[0] / peaks[1]:.1f}"])
    print(
        f"\npeak memory of {config_path} {' '.join(overrides)}, {'GPU' if DEVICE.type == 'cuda' else 'process'}, {machine()}\n"
    )
    print_table(["", "without", "with checkpointing", "ratio"], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
