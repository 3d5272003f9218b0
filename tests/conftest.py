"""Shared fixtures: a tiny experiment in a temporary folder, and image files."""

import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads of several workers would wait for each other

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from training import trainer
from training.logger import plot_curves

TINY = """
name: tiny
device: cpu
precision: float32
data: {source: synthetic_faces, num_images: 48, image_size: 16}
vae: {channels: [8, 16], latent_channels: 4, attention: false, perceptual: {net: none}, steps: 6, batch_size: 8, log_every: 2,
      eval_every: 3, warmup: 2, ema_decay: 0.9}
diffusion: {channels: [16, 32], num_res_blocks: 1, attn_resolutions: [4], steps: 6, batch_size: 8, log_every: 2, eval_every: 3, warmup: 2,
            ema_decay: 0.9, sample_images: 4}
sampling: {sampler: ddim, rows: 2, cols: 3, steps: 4}
logging: {tensorboard: false}
"""


class Experiment:
    """A tiny experiment in its own folder. Runs stages by calling their main(argv)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.config.write_text(TINY)
        self.run_dir = folder / "runs" / "tiny"

    def argv(self, *overrides: str) -> list[str]:
        return [str(self.config), f"runs_dir={self.folder}/runs", f"results_dir={self.folder}/results", *overrides]

    def run(self, stage: str, *overrides: str) -> int:
        return __import__(stage).main(self.argv(*overrides))

    def train_all(self, *overrides: str) -> None:
        for stage in ("train_vae", "create_encodings", "train_diffusion"):
            assert self.run(stage, *overrides) == 0, stage


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Do not plot curves, except in `trained`: a plot takes longer than these tiny trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_curves", lambda folder: None)
        yield


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    return Experiment(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Experiment:
    """An experiment after the first three stages. Tests must not change its files."""
    experiment = Experiment(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_curves", plot_curves)
        experiment.train_all()
    return experiment


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A folder of 20 JPEGs of 40x30 pixels, each in one color."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (40, 30), (12 * i, 255 - 12 * i, 100)).save(folder / f"{i:02d}.jpg", quality=95)
    return folder


def noise_image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
