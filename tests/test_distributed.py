"""Micro-batches and several processes give the same result as one pass in one process, up to rounding."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, Experiment
from PIL import Image
from safetensors.torch import load_file

import train_vae
from models.unet import UNet
from pipeline.generate import OutputSpec
from pipeline.latent_diffusion import LatentDiffusion
from utils import cli, distributed
from utils.checkpoints import save_tensors
from utils.errors import UserError
from utils.settings import load_config

RANKS = str(ROOT / "tests" / "ranks.py")
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


@pytest.fixture(scope="module")
def two_ranks():
    """Function that runs a stage in two processes over gloo: two_ranks(stage, argv, **options) -> result of each rank."""
    server = subprocess.Popen([sys.executable, RANKS], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def run(stage: str, argv: list[str], **options) -> list[dict]:
        print(json.dumps({"stage": stage, "argv": argv, "port": free_port(), **options}), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def run_on_two_nodes(jobs: list[dict]) -> list[tuple[int, str, str, float]]:
    """Run jobs in one process on each of two agents of torchrun. Returns (code, out, err, time of its end) of each agent."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr",
               "127.0.0.1", "--local-addr", "127.0.0.1", "--master-port", str(free_port())]  # fmt: skip
    agents = [
        subprocess.Popen([*command, "--node-rank", str(node), RANKS, json.dumps(jobs)], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for node in range(2)
    ]  # fmt: skip

    def wait(agent: subprocess.Popen) -> tuple[int, str, str, float]:
        out, err = agent.communicate(timeout=150)
        return agent.returncode, out, err, time.time()

    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(wait, agents))
    finally:
        for agent in agents:
            agent.terminate()  # which ends its process


def test_two_nodes_match_one_process_and_survive_a_killed_rank(single_process, two_ranks, tmp_path):
    """All stages with two agents of torchrun; then a training in which rank 1 is killed, which two processes resume."""
    experiment = Experiment(tmp_path)
    jobs = [{"stage": stage, "argv": experiment.argv(*LABELS), "next_port": free_port()} for stage in STAGES]
    killed = experiment.argv(*LABELS, "diffusion.name=killed", "diffusion.save_minutes=1e-9")
    jobs.append({"stage": "train_diffusion", "argv": killed, "fault": [[1, 2, "SIGKILL"]]})
    (code, out, err, end), (other_code, other_out, other_err, other_end) = run_on_two_nodes(jobs)

    assert "latents: the std of generated latents" in out, err + other_err
    assert not other_out and "%|" not in other_err  # only rank 0 prints and has progress bars
    assert_same_training(single_process, experiment)
    name = "tiny_cosine_ddim_2x3"
    for file in (f"{name}.png", f"{name}_strip.png"):
        one, two = (np.asarray(Image.open(e.folder / "results" / file)).astype(int) for e in (single_process, experiment))
        assert one.shape == two.shape and np.abs(one - two).max() <= 3, file
    one, two = (torch.load(e.run_dir / "encodings.pt", weights_only=True) for e in (single_process, experiment))
    torch.testing.assert_close(one["mean"], two["mean"], rtol=0, atol=2e-3)
    assert one["labels"].equal(two["labels"])
    assert not list(experiment.run_dir.glob("encodings.chunks*")) and not list(tmp_path.rglob("*.tmp"))

    assert code and other_code and "Signal 9" in other_err
    assert end - other_end < 60
    before, line = err.split("error: another process of this run has ended")
    assert "Traceback" not in before and "run the same command again on all nodes" in line.splitlines()[0]
    # A signal to one rank stops both, with the state saved.
    results = two_ranks("train_diffusion", killed, fault=[[1, 4, "SIGTERM"]])
    assert [result["code"] for result in results] == [128 + signal.SIGTERM] * 2, results
    assert "stopped at step 5 of 6; state saved" in results[0]["err"]
    results = two_ranks("train_diffusion", killed)
    assert [result["code"] for result in results] == [0, 0], results
    uninterrupted, resumed = (load_file(experiment.run_dir / name / "unet.safetensors") for name in ("cosine", "killed"))
    assert all(uninterrupted[k].equal(resumed[k]) for k in uninterrupted)


@pytest.mark.parametrize("event, reason", [("SIGKILL", " by peer"), ("SIGSTOP", "(Timed out waiting ")])
def test_a_process_that_waits_for_something_else_ends_when_another_is_lost(experiment, two_ranks, event, reason):
    """The main thread waits for something else, such as a GPU, and gets no error. SIGSTOP: a node that does not answer."""
    started, times = time.monotonic(), {"GRACE_SECONDS": 1, "HEARTBEAT_SECONDS": 0.5, "HEARTBEAT_TIMEOUT": 3}
    fault = [[0, 2, "sleep"], [1, 2, event]]
    first, second = two_ranks("train_vae", experiment.argv(), fault=fault, set=times, one_node=event == "SIGSTOP")
    assert (first["code"], second["code"]) == (1, -signal.SIGKILL) and time.monotonic() - started < 60
    lines = [line for line in first["err"].splitlines() if line.startswith("error: another process of this run has ended")]
    assert len(lines) == 1 and reason in lines[0], first["err"]


def test_nodes_without_a_shared_disk_are_one_line(experiment, two_ranks, image_folder):
    folders = [experiment.folder / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    argv = [str(experiment.config), "runs_dir=runs", "data.source=folder", f"data.path={image_folder}"]
    no_delay = {"SHARED_SECONDS": 0.5}
    results = two_ranks("train_vae", argv, cwd=list(map(str, folders)), set=no_delay)
    message = (
        f"error: process 1 on {socket.gethostname()} does not see what process 0 on {socket.gethostname()} writes to "
        f"{folders[0]}/runs/tiny but as {folders[1]}/runs/tiny: several nodes need this folder on a shared file system\n"
    )
    assert [result["code"] for result in results] == [2, 2]
    assert [result["err"] for result in results] == [message, f"process 1: {message}"]
    assert not any(path.is_file() for folder in folders for path in folder.rglob("*"))

    # The weights are shared and the image cache is not.
    for folder in folders:
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "runs" / "tiny").symlink_to(experiment.folder)
    first, second = two_ranks("train_vae", argv, cwd=list(map(str, folders)), set=no_delay)
    assert f"writes to {folders[0]}/runs/cache" in first["err"] and (first["code"], second["code"]) == (2, 2)

    # Each node has its own images.
    shutil.copytree(image_folder, folders[1] / "images")
    shutil.copytree(image_folder, folders[0] / "images")
    argv = experiment.argv("data.source=folder", "data.path=images")
    first, second = two_ranks("train_vae", argv, cwd=list(map(str, folders)))
    assert "error: data: the image cache is folder16-" in first["err"] and (first["code"], second["code"]) == (2, 2)
    assert "all processes need the same files and the same data.path" in first["err"]


def test_ranks_must_agree_on_the_encodings(trained, two_ranks, tmp_path):
    """The config files of two nodes have different storage types."""
    shutil.copytree(trained.run_dir.parent, tmp_path / "runs")
    folders = {"float16": tmp_path / "a", "bfloat16": tmp_path / "b"}
    for dtype, folder in folders.items():
        folder.mkdir()
        (folder / "tiny.yaml").write_text(f"{trained.config.read_text()}encodings: {{dtype: {dtype}}}\n")
    argv, path = ["tiny.yaml", f"runs_dir={tmp_path}/runs"], tmp_path / "runs" / "tiny" / "encodings.pt"
    for message in (f"whether {path} is up to date is True in process 0 and False", "the folder for encodings is "):
        results = two_ranks("create_encodings", argv, cwd=list(map(str, folders.values())))
        assert [result["code"] for result in results] == [2, 2]
        assert f"error: {message}" in (error := results[0]["err"])
        assert "all processes need the same files and settings" in error
        path.unlink(missing_ok=True)
    assert not list(path.parent.glob("encodings*"))


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


def test_a_batch_smaller_than_the_number_of_processes(experiment, monkeypatch):
    """Reported before the dataset is read."""
    config = load_config(experiment.config, ["data.source=folder", "data.path=missing", "vae.batch_size=4"])
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    with pytest.raises(UserError, match=r"vae.batch_size must be at least the number of processes, 5 \(got 4\)"):
        train_vae.train(config, dry_run=True)


def test_errors_are_printed_once(experiment, two_ranks):
    argv = experiment.argv("data.source=folder", "data.path=none")
    first, second = two_ranks("train_vae", argv, one_node=True)
    assert first["code"] == 2 and second["code"]
    assert first["err"].count("error: data.path: none does not exist") == 1 and "error" not in second["err"]
    assert not experiment.run_dir.exists()


def test_interrupted_encoding_resumes(trained, tmp_path, monkeypatch):
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    path = experiment.run_dir / "encodings.pt"
    before = torch.load(path, weights_only=True)
    path.unlink()
    monkeypatch.setattr("dataset.chunks.CHUNK", 20)
    written = []

    def recorded_save(file, content):
        written.append(file.name)
        save_tensors(file, content)

    def interrupted_save(file, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        recorded_save(file, content)

    monkeypatch.setattr("dataset.chunks.save_tensors", interrupted_save)
    assert experiment.run("create_encodings") == 130 and not path.exists()
    monkeypatch.setattr("dataset.chunks.save_tensors", recorded_save)
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
