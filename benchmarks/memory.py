"""How much memory does training need, with and without checkpointed activations?

    python benchmarks/memory.py configs/faces512.yaml [section.key=value ...]

Trains both networks of a config for two steps on drawn faces, each in a process of its own, the batch in one piece, the adversarial term
from the start, without a perceptual network unless one is asked for. Prints the peak: of the GPU's memory, or on a CPU of the whole
process (torch itself takes some 0.4 GB of that). "nan": did not fit.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import timing  # puts the project on the path
from timing import DEVICE, machine, print_table

from utils.settings import load_config

ONE = """
import resource, sys
sys.path.insert(0, {root!r})
import {stage} as stage
assert stage.main(sys.argv[1:]) == 0
import torch
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak)
"""


def peak_of(stage: str, argv: list[str]) -> float:
    """Bytes; NaN where it fails, with what it said."""
    code = ONE.format(root=str(Path(timing.__file__).parent.parent), stage=stage)
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return float("nan")
    return float(done.stdout.split("peak ")[-1])


def main(config: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        argv = [config, f"runs_dir={folder}", "data.source=synthetic_faces", "data.num_images=160", "data.val_fraction=0.05", "vae.perceptual.net=none",
                "vae.steps=2", "diffusion.steps=2", "diffusion.sample_images=1", "encodings.batch_size=4", "compile=false", "vae.adversarial.start=0", *overrides]  # fmt: skip
        rows, settings = [], load_config(config, argv[1:])
        for stage, section in (("train_vae", "vae"), ("train_diffusion", "diffusion")):
            if section == "diffusion":
                peak_of("create_encodings", argv)
            found = []
            for on in ("false", "true"):
                name, whole = (
                    f"diffusion.name=checkpointing-{on}",
                    f"{section}.micro_batch={getattr(settings, section).batch_size}",
                )
                if section == "vae":
                    for before in Path(folder).glob("*/vae"):
                        shutil.rmtree(before)
                found.append(peak_of(stage, [*argv, name, whole, f"{section}.checkpointing={on}"]))
            rows.append([stage, *(f"{peak / 1e9:.2f} GB" for peak in found), f"{found[0] / found[1]:.1f}"])
    print(f"\npeak memory of {config} {' '.join(overrides)}, {'GPU' if DEVICE.type == 'cuda' else 'process'}, {machine()}\n")
    print_table(["", "plain", "checkpointing", "plain / checkpointing"], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
