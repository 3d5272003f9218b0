"""Micro-batches and several processes: the same result as one pass in one process, to rounding."""

import itertools
import json
import os
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
from pipeline.generate import OutputSpec, draw
from pipeline.latent_diffusion import LatentDiffusion
from pipeline.prompts import Requests
from utils import cli, distributed
from utils.errors import UserError
from utils.settings import load_config

STAGES = ("train_vae", "create_encodings", "train_diffusion", "infer")
LABELS = ("diffusion.condition=class", "diffusion.dropout=0.0", "sampling.labels=[{hat: 1}, {sex: 0}]", "sampling.trajectory_frames=2", "sampling.batch_size=2")  # fmt: skip


def losses(experiment, stage, name="train/loss"):
    lines = [json.loads(line) for line in (experiment.run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def same(a: Experiment, b: Experiment) -> None:
    """Adam's first steps have the size of lr whatever the gradient's, and so rounding shows where a gradient is nearly zero."""
    for stage, weights in (("vae", "vae.safetensors"), ("cosine", "unet.safetensors")):
        assert losses(a, stage) == pytest.approx(losses(b, stage), rel=1e-4)
        assert losses(a, stage, "train/grad_norm") == pytest.approx(losses(b, stage, "train/grad_norm"), rel=1e-3)
        one, two = (load_file(e.run_dir / stage / weights) for e in (a, b))
        difference = max(float((one[k] - two[k]).abs().mean()) for k in one)
        assert difference < 1e-4, (stage, difference)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Experiment:
    experiment = Experiment(tmp_path_factory.mktemp("alone"))
    for stage in STAGES:
        assert experiment.run(stage, *LABELS) == 0, stage
    return experiment


def test_micro_batches_change_nothing(alone, tmp_path):
    experiment = Experiment(tmp_path)
    experiment.train_all(*LABELS, "vae.micro_batch=3", "diffusion.micro_batch=5")
    same(alone, experiment)


def test_what_does_not_fit_is_halved(alone, tmp_path, monkeypatch, capsys):
    """A network that has memory for four latents once, then for three: 8 -> 4 -> 2."""
    forward, fours = UNet.forward, itertools.count()

    def cramped(self, z_t, *rest):
        # Four fit once: what the first part left is to be forgotten when the second does not fit.
        if self.training and (len(z_t) > 4 or (len(z_t) == 4 and next(fours) > 0)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, z_t, *rest)

    monkeypatch.setattr(UNet, "forward", cramped)
    experiment = Experiment(tmp_path)
    experiment.train_all(*LABELS)
    assert "in micro-batches of 2 from here" in capsys.readouterr().out
    same(alone, experiment)
    assert experiment.run("train_diffusion", *LABELS, "diffusion.steps=8") == 0
    out = capsys.readouterr().out
    assert "after 8 steps" in out and "in micro-batches of" not in out  # it goes on with what fitted


def test_too_large_a_micro_batch_is_one_line(trained, monkeypatch, capsys):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet, "forward", none)
    assert trained.run("train_diffusion", "diffusion.name=cramped", "diffusion.micro_batch=4") == 2
    assert "4 images at a time do not fit the memory" in capsys.readouterr().err


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


def in_two_processes(experiment: Experiment, stages, *overrides) -> list[subprocess.CompletedProcess]:
    """The stages one after the other as torchrun would start them: two processes over gloo."""
    jobs = json.dumps([[stage, free_port(), experiment.argv(*overrides)] for stage in stages])
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    said = [[open(experiment.folder / f"{name}{r}", "w+") for name in ("out", "err")] for r in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, jobs], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                         stdout=said[r][0], stderr=said[r][1], cwd=experiment.folder)
        for r in range(2)
    ]  # fmt: skip
    until = time.monotonic() + 300
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if any(process.poll() for process in processes) or time.monotonic() > until:  # torchrun too ends the others
            for process in processes:
                process.terminate()
    texts = [[file.seek(0) or file.read() for file in files] for files in said]
    return [subprocess.CompletedProcess(p.args, p.returncode, *text) for p, text in zip(processes, texts)]


def test_two_processes_are_one(alone, tmp_path):
    experiment = Experiment(tmp_path)
    first, second = in_two_processes(experiment, STAGES, *LABELS)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "calibration" in first.stdout and not second.stdout  # rank 0 alone speaks
    same(alone, experiment)
    name = "tiny_cosine_ddim_2x3"
    for file in (f"{name}.png", f"{name}_strip.png"):
        one, two = (np.asarray(Image.open(e.folder / "results" / file)).astype(int) for e in (alone, experiment))
        assert one.shape == two.shape and np.abs(one - two).max() <= 3, file
    one, two = (torch.load(e.run_dir / "encodings.pt", weights_only=True) for e in (alone, experiment))
    torch.testing.assert_close(one["mean"], two["mean"], rtol=0, atol=2e-3)
    assert one["labels"].equal(two["labels"])
    assert not list(experiment.run_dir.glob("encodings.parts*")) and not list(tmp_path.rglob("*.tmp"))


def test_a_grid_smaller_than_a_batch_is_shared(trained, monkeypatch):
    """Each of three processes draws a part of what fits one batch, and all draw the whole."""
    config = load_config(str(trained.config), trained.argv()[1:])
    model, drawn = LatentDiffusion(config, torch.device("cpu"), torch.float32), []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        drawn.append(sorted(draw(model, config.sampling, Requests([], None), None, 1.0, OutputSpec(7, 7, [], None)).pixels))
    assert drawn == [[0, 1, 2], [3, 4, 5], [6]]


def test_bad_input_is_said_once(experiment):
    first, second = in_two_processes(experiment, ["train_vae"], "data.source=folder", "data.path=none")
    assert first.returncode == 2 and second.returncode
    assert first.stderr.count("error: data.path: none does not exist") == 1 and "error" not in second.stderr


def test_encoding_goes_on_where_it_was_interrupted(trained, tmp_path, monkeypatch):
    import shutil

    import create_encodings
    from utils.checkpoints import save_tensors

    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    path = experiment.run_dir / "encodings.pt"
    before = torch.load(path, weights_only=True)
    path.unlink()
    monkeypatch.setattr(create_encodings, "PART", 20)
    written = []

    def interrupted(file, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        save_tensors(file, content)

    monkeypatch.setattr(create_encodings, "save_tensors", interrupted)
    assert experiment.run("create_encodings") == 130 and not path.exists()
    monkeypatch.setattr(
        create_encodings, "save_tensors", lambda file, content: (written.append(file.name), save_tensors(file, content))
    )
    assert experiment.run("create_encodings") == 0
    assert len(written) == len(set(written))  # no part was made twice
    after = torch.load(path, weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in ("mean", "mean_flipped", "val"))


WAITING = """
import os, sys, time
sys.path.insert(0, {root!r})
from utils import distributed
os.environ.update(WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
rank = next((r for r in (1, 2, 3) if os.fork() == 0), 0)
os.environ["RANK"] = str(rank)
distributed.init()
if rank == 3:
    time.sleep(1)
    open({mark!r}, "w").close()
distributed.barrier()
there = os.path.exists({mark!r})
distributed.cleanup()
if rank == 0:
    print("there" if there else "too early")
"""


def test_waiting_is_for_all(tmp_path):
    """Of four processes the last is late: the first goes on after it, not after those that stand next to it in a tree."""
    code = WAITING.format(root=str(ROOT), port=free_port(), mark=str(tmp_path / "mark"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "there", done.stderr[-2000:]


def test_an_error_of_one_process_alone_is_said(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "IS_MAIN", False)
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)
    monkeypatch.setattr(distributed, "init", lambda: None)

    def work(config, dry_run):
        raise UserError("it does not fit")

    assert cli.run(work, "", []) == 2
    assert capsys.readouterr().err == "process 1: error: it does not fit\n"
