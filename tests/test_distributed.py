"""Micro-batches and several processes give the same result as one pass in one process, up to rounding."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, Experiment
from PIL import Image
from safetensors.torch import load_file

from models.unet import UNet
from pipeline.generate import OutputSpec
from pipeline.latent_diffusion import LatentDiffusion
from utils import cli, distributed
from utils.checkpoints import save_tensors
from utils.errors import UserError
from utils.settings import load_config

STAGES = ("train_vae", "create_encodings", "train_diffusion", "infer")
LABELS = (
    "diffusion.condition=class",
    "diffusion.dropout=0.0",
    "sampling.labels=[{hat: 1}, {sex: 0}]",
    "sampling.trajectory_frames=2",
    "sampling.batch_size=2",
)


def logged_values(experiment, stage, name):
    lines = [json.loads(line) for line in (experiment.run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_same_training(a: Experiment, b: Experiment) -> None:
    """Compare losses and mean differences of weights.

    Adam's first steps have the size of lr for any gradient, so rounding changes single weights whose gradient is near zero.
    """
    for stage, weights in (("vae", "vae.safetensors"), ("cosine", "unet.safetensors")):
        for name, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
            assert logged_values(a, stage, name) == pytest.approx(logged_values(b, stage, name), rel=tolerance)
        one, two = (load_file(e.run_dir / stage / weights) for e in (a, b))
        difference = max(float((one[k] - two[k]).abs().mean()) for k in one)
        assert difference < 1e-4, (stage, difference)


@pytest.fixture(scope="module")
def single_process(tmp_path_factory) -> Experiment:
    experiment = Experiment(tmp_path_factory.mktemp("single_process"))
    for stage in STAGES:
        assert experiment.run(stage, *LABELS) == 0, stage
    return experiment


def test_micro_batches_give_the_same_result(single_process, tmp_path):
    experiment = Experiment(tmp_path)
    experiment.train_all(*LABELS, "vae.micro_batch=3", "diffusion.micro_batch=5")
    assert_same_training(single_process, experiment)


def test_micro_batches_that_do_not_fit_are_halved(single_process, tmp_path, monkeypatch, capsys):
    """A network with memory for four latents once, then for three: 8 -> 4 -> 2."""
    forward, calls_with_four = UNet.forward, itertools.count()

    def limited_forward(self, z_t, *rest):
        # Four latents fit once: the step must discard the first half's gradients when the second half does not fit.
        if self.training and (len(z_t) > 4 or (len(z_t) == 4 and next(calls_with_four) > 0)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, z_t, *rest)

    monkeypatch.setattr(UNet, "forward", limited_forward)
    experiment = Experiment(tmp_path)
    experiment.train_all(*LABELS)
    assert "out of GPU memory; continuing with micro-batches of 2" in capsys.readouterr().out
    assert_same_training(single_process, experiment)
    assert experiment.run("train_diffusion", *LABELS, "diffusion.steps=8") == 0
    out = capsys.readouterr().out
    assert "after 8 steps" in out and "micro-batches of" not in out  # resumes with the size that fit


def test_a_fixed_micro_batch_that_does_not_fit_is_one_line(trained, monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet, "forward", out_of_memory)
    assert trained.run("train_diffusion", "diffusion.name=out_of_memory", "diffusion.micro_batch=4") == 2
    assert "out of memory with micro-batches of 4; use a smaller micro_batch" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


PROCESS = """
import json, os, sys
for stage, port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    code = __import__(stage).main(argv)
    if code:
        sys.exit(code)
"""


def run_in_two_processes(experiment: Experiment, stages, *overrides) -> list[subprocess.CompletedProcess]:
    """Run the stages one after the other in two processes over gloo, started as by torchrun."""
    jobs = json.dumps([[stage, free_port(), experiment.argv(*overrides)] for stage in stages])
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    outputs = [[open(experiment.folder / f"{name}{r}", "w+") for name in ("out", "err")] for r in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, jobs], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=outputs[r][0], stderr=outputs[r][1], cwd=experiment.folder)
        for r in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if any(process.poll() for process in processes) or time.monotonic() > deadline:  # as torchrun
            for process in processes:
                process.terminate()
    texts = [[file.seek(0) or file.read() for file in files] for files in outputs]
    return [subprocess.CompletedProcess(p.args, p.returncode, *text) for p, text in zip(processes, texts)]


def test_two_processes_match_one(single_process, tmp_path):
    experiment = Experiment(tmp_path)
    first, second = run_in_two_processes(experiment, STAGES, *LABELS)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "latents: the std of generated latents" in first.stdout and not second.stdout  # only rank 0 prints
    assert_same_training(single_process, experiment)
    name = "tiny_cosine_ddim_2x3"
    for file in (f"{name}.png", f"{name}_strip.png"):
        one, two = (np.asarray(Image.open(e.folder / "results" / file)).astype(int) for e in (single_process, experiment))
        assert one.shape == two.shape and np.abs(one - two).max() <= 3, file
    one, two = (torch.load(e.run_dir / "encodings.pt", weights_only=True) for e in (single_process, experiment))
    torch.testing.assert_close(one["mean"], two["mean"], rtol=0, atol=2e-3)
    assert one["labels"].equal(two["labels"])
    assert not list(experiment.run_dir.glob("encodings.chunks*")) and not list(tmp_path.rglob("*.tmp"))


def test_a_grid_smaller_than_a_batch_is_shared(trained, monkeypatch):
    """Three processes divide images that would fit into one batch."""
    config = load_config(str(trained.config), trained.argv()[1:])
    model, indices = LatentDiffusion.load(config, torch.device("cpu"), torch.float32), []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        samples = model.generate(config.sampling, OutputSpec(7, keep_pixels=7, distributed=True))
        indices.append(sorted(samples.pixels))
    assert indices == [[0, 1, 2], [3, 4, 5], [6]]


def test_errors_are_printed_once(experiment):
    first, second = run_in_two_processes(experiment, ["train_vae"], "data.source=folder", "data.path=none")
    assert first.returncode == 2 and second.returncode
    assert first.stderr.count("error: data.path: none does not exist") == 1 and "error" not in second.stderr


def test_interrupted_encoding_resumes(trained, tmp_path, monkeypatch):
    import create_encodings

    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    path = experiment.run_dir / "encodings.pt"
    before = torch.load(path, weights_only=True)
    path.unlink()
    monkeypatch.setattr(create_encodings, "CHUNK", 20)
    written = []

    def recorded_save(file, content):
        written.append(file.name)
        save_tensors(file, content)

    def interrupted_save(file, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        recorded_save(file, content)

    monkeypatch.setattr(create_encodings, "save_tensors", interrupted_save)
    assert experiment.run("create_encodings") == 130 and not path.exists()
    monkeypatch.setattr(create_encodings, "save_tensors", recorded_save)
    assert experiment.run("create_encodings") == 0
    assert len(written) == len(set(written))  # no chunk is written twice
    after = torch.load(path, weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in ("mean", "mean_flipped", "val_mean"))


BARRIER = """
import os, sys, time
sys.path.insert(0, {root!r})
import datetime
from utils import distributed
distributed.TIMEOUT = datetime.timedelta(seconds=2)
os.environ.update(WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
rank = next((r for r in (1, 2, 3) if os.fork() == 0), 0)
os.environ["RANK"] = str(rank)
distributed.init()
if rank == 3:
    time.sleep(3)
    open({file!r}, "w").close()
distributed.barrier()
file_exists = os.path.exists({file!r})
distributed.cleanup()
if rank == 0:
    print("exists" if file_exists else "too early")
"""


def test_barrier_waits_for_all_processes(tmp_path):
    """Rank 0 waits for a late rank 3, not only for its neighbors in a communication tree, and longer than TIMEOUT."""
    code = BARRIER.format(root=str(ROOT), port=free_port(), file=str(tmp_path / "file"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "exists", done.stderr[-2000:]


def test_an_error_in_one_process_names_the_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "IS_MAIN", False)
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)
    monkeypatch.setattr(distributed, "init", lambda: None)

    def work(config, dry_run):
        raise UserError("it does not fit")

    assert cli.run(work, "", []) == 2
    assert capsys.readouterr().err == "process 1: error: it does not fit\n"
