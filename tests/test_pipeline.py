"""The four scripts end to end on tiny synthetic data: outputs, resuming, sampling, and errors."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
from conftest import Experiment, Hostile
from PIL import Image
from safetensors.torch import load_file, save_file

from config import LoggingConfig, VAEConfig
from dataset import TRAIN, VAL, loader
from dataset.encodings import LatentDataset
from models.normalizer import Normalizer
from models.schedules import make_schedule
from models.unet import UNet
from pipeline.latent_stats import Moments, latent_stats, std_warnings
from pipeline.stage_files import load_images_for, load_vae
from training import trainer as trainer_module
from training.logger import Logger
from training.trainer import Trainer
from utils import device, files
from utils.checkpoints import load_weights, save_tensors, save_weights
from utils.checksums import checksum
from utils.device import pick_precision
from utils.errors import Stopped
from utils.settings import load_config


def error_line(experiment, capsys, stage, *overrides, code=2) -> str:
    """Run a stage that must fail with one line and no traceback, and return that line."""
    capsys.readouterr()
    assert experiment.run(stage, *overrides) == code
    error = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in error if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in "".join(error), error
    return lines[0]


def copy_of(trained, tmp_path) -> Experiment:
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    return Experiment(tmp_path)


# The four stages


def test_four_stages_write_all_files(trained, capsys):
    assert trained.run("infer", "sampling.save_images=true") == 0
    out = capsys.readouterr().out
    assert "latents: the std of generated latents is" in out and "times that of training latents" in out
    assert "of latent values in clean estimates" in out and "of pixel values, which were outside [-1, 1]" in out
    run_dir = trained.run_dir
    for name in (
        "vae/vae.safetensors",
        "vae/state.pt",
        "vae/metrics.jsonl",
        "vae/curves.png",
        "vae/reconstructions.png",
        "encodings.pt",
        "cosine/unet.safetensors",
        "cosine/state.pt",
        "cosine/metrics.jsonl",
        "cosine/curves.png",
        "cosine/samples/step_0000006.png",
    ):
        assert (run_dir / name).stat().st_size > 0, name
    assert not list(run_dir.rglob("*.tmp"))
    grid = Image.open(trained.folder / "results" / "tiny_cosine_ddim_2x3.png")
    assert grid.size == (3 * 16 + 2 * 2, 2 * 16 + 2)
    assert json.loads(grid.text["config"])["sampling"]["steps"] == 4 and "std_ratio" in json.loads(grid.text["latent_stats"])
    singles = sorted((trained.folder / "results" / "tiny_cosine_ddim_2x3").iterdir())
    assert len(singles) == 6
    assert np.array_equal(np.asarray(Image.open(singles[4])), np.asarray(grid)[18:, 18:34])  # row 1, column 1


def test_metrics_of_both_training_stages(trained):
    lines = [json.loads(line) for line in (trained.run_dir / "cosine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    last = [line for line in lines if "val/unweighted_loss" in line][-1]
    bins = [last[f"val/loss_bin{b}"] for b in range(10)]
    assert last["val/unweighted_loss"] == pytest.approx(sum(bins) / 10) and last["images_seen"] == 48
    vae = [json.loads(line) for line in (trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert {"val/psnr", "val/ssim", "val/nats_per_dim"} <= vae[-1].keys()


def test_running_finished_stages_again_changes_nothing(trained, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in trained.run_dir.rglob("*.safetensors")} | {
        "e": (trained.run_dir / "encodings.pt").stat().st_mtime_ns
    }
    monkeypatch.setattr(Trainer, "step", lambda *_, **__: pytest.fail("trained twice"))
    trained.train_all()
    out = capsys.readouterr().out
    assert out.count("already trained") == 2 and "up to date" in out
    assert before == {p: p.stat().st_mtime_ns for p in trained.run_dir.rglob("*.safetensors")} | {
        "e": (trained.run_dir / "encodings.pt").stat().st_mtime_ns
    }


def test_changed_labels_need_new_encodings_but_no_new_vae(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    (path,) = experiment.folder.glob("runs/cache/*/labels.npy")
    np.save(path, 1 - np.load(path).clip(0, 1))
    checksums = json.loads((path.parent / "checksums.json").read_text())
    (path.parent / "checksums.json").write_text(json.dumps(checksums | {path.name: checksum(path.read_bytes())}))
    assert experiment.run("create_encodings") == 0
    encodings = LatentDataset.load(experiment.run_dir / "encodings.pt")
    assert torch.equal(torch.cat([encodings.labels, encodings.val_labels]), torch.from_numpy(np.load(path)))


def test_two_schedules_share_one_vae(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    vae = (experiment.run_dir / "vae" / "vae.safetensors").read_bytes()
    assert experiment.run("train_diffusion", "diffusion.schedule=linear") == 0
    assert experiment.run("infer", "diffusion.schedule=linear") == 0 and experiment.run("infer") == 0
    assert {p.name for p in (tmp_path / "results").glob("*.png")} >= {"tiny_linear_ddim_2x3.png", "tiny_cosine_ddim_2x3.png"}
    assert (experiment.run_dir / "vae" / "vae.safetensors").read_bytes() == vae


def test_dry_run_prints_the_plan_and_writes_nothing(experiment, capsys):
    assert experiment.run("train_vae", "--dry-run") == 0
    out = capsys.readouterr().out
    for part in ("parameters", "48 for training", "steps: 6 with 8 images each", "vae.safetensors"):
        assert part in out, part
    assert not (experiment.folder / "runs").exists()


@pytest.mark.parametrize(
    "changes",
    [
        ("diffusion.prediction=v", "diffusion.weighting=min_snr"),
        (
            "diffusion.schedule=flow",
            "diffusion.prediction=velocity",
            "diffusion.timestep_sampling=logit_normal",
            "diffusion.weighting=min_snr",
        ),
        ("diffusion.prediction=x0", "diffusion.schedule=scaled_linear"),
        ("encodings.normalization=per_channel", "encodings.dtype=bfloat16", "data.flip=false", "diffusion.dropout=0.2"),
        (
            "vae.output_activation=tanh",
            "vae.reconstruction=l1",
            "vae.attention=true",
            "vae.patch_size=2",
            "vae.channels=[8]",
            "vae.kl_warmup=4",
            "vae.lr_decay=cosine",
        ),
        ("precision=bfloat16", "sampling.precision=bfloat16", "logging.tensorboard=true"),
    ],
    ids=lambda c: c[0],
)
def test_other_settings_run(experiment, changes):
    experiment.train_all(*changes)
    assert (
        experiment.run("infer", "sampling.sampler=ancestral", "sampling.variance=beta", "sampling.x0_clamp=1.0", *changes)
        == 0
    )


@pytest.fixture
def tracker(monkeypatch):
    """Fake modules wandb and trackio that record the calls."""
    calls = []
    for name in ("wandb", "trackio"):
        fake = types.ModuleType(name)
        fake.init = lambda **options: calls.append(("init", options))
        fake.log = lambda metrics, step: calls.append(("log", step, metrics))
        fake.Image, fake.finish = (lambda image: ("image", image.size)), (lambda: calls.append(("finish",)))
        monkeypatch.setitem(sys.modules, name, fake)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_continues_a_resumed_run(tmp_path, tracker, name):
    """Runs are identified by id in wandb and by name in trackio. A run that starts at step 0 is a new one."""
    runs, folder = [], tmp_path / "tiny" / "vae"
    for start in (0, 2, 0):
        tracker.clear()
        logger = Logger(folder, {"seed": 7}, LoggingConfig(tensorboard=False, tracker=name), start)
        logger.log_metrics(start + 1, {"loss": 0.5})
        logger.log_image(start + 1, "samples", Image.new("RGB", (4, 3)))
        logger.close()
        (_, options), *logs = tracker
        assert logs == [("log", start + 1, {"loss": 0.5}), ("log", start + 1, {"samples": ("image", (4, 3))}), ("finish",)]
        assert options["name"].startswith("tiny-vae-") and ("id" in options) == (name == "wandb")
        assert {k: options[k] for k in ("project", "config", "resume")} == {
            "project": "nanoldm", "config": {"seed": 7}, "resume": "allow"
        }  # fmt: skip
        runs.append(options["id" if name == "wandb" else "name"])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stage", ["train_vae", "train_diffusion"])
def test_missing_tracker_fails_before_any_work(experiment, monkeypatch, capsys, stage):
    monkeypatch.setitem(sys.modules, "trackio", None)  # import raises ImportError
    assert experiment.run(stage, "logging.tracker=trackio", "--dry-run") == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "pip install trackio" in err and "logging.tracker=none" in err and not out
    assert not (experiment.folder / "runs").exists()


def test_tensorboard_and_tracker_logs(experiment, tracker):
    assert experiment.run("train_vae", "logging.tensorboard=true", "logging.tracker=trackio") == 0
    (_, options), *logs, last = tracker
    assert options["config"]["vae"]["steps"] == 6 and last == ("finish",)
    assert {step for _, step, metrics in logs if "train/loss" in metrics} == {2, 4, 6}
    assert {step for _, step, metrics in logs if "reconstructions" in metrics} == {3, 6}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(experiment.run_dir / "vae" / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Images("reconstructions")] == [3, 6]


# Resuming


def test_resuming_is_bitwise_exact(experiment, tmp_path_factory):
    """8 steps = 5 steps, resume, 3 steps, for both stages, with dropout and flips. The epoch ends after step 6."""
    settings = ("vae.steps=8", "diffusion.steps=8", "diffusion.dropout=0.3", "diffusion.optimizer=muon")
    experiment.train_all(*settings)
    resumed = Experiment(tmp_path_factory.mktemp("resumed"))
    for stage, folder, file in (("train_vae", "vae", "vae.safetensors"), ("train_diffusion", "cosine", "unet.safetensors")):
        section = "vae" if folder == "vae" else "diffusion"
        assert resumed.run(stage, *settings, f"{section}.steps=5") == 0
        assert resumed.run(stage, *settings) == 0
        if folder == "vae":
            assert resumed.run("create_encodings", *settings) == 0
        one, two = load_file(experiment.run_dir / folder / file), load_file(resumed.run_dir / folder / file)
        assert all(torch.equal(one[name], two[name]) for name in one)
        states = [torch.load(e.run_dir / folder / "state.pt", weights_only=True) for e in (experiment, resumed)]
        assert all(torch.equal(states[0]["net"][name], states[1]["net"][name]) for name in states[0]["net"])
        assert torch.equal(*(state["optimizers"][0]["state"][0]["exp_avg_sq"] for state in states))


def test_states_from_before_muon_can_be_resumed(experiment, tmp_path_factory):
    """They contain one optimizer, not a list."""
    resumed = Experiment(tmp_path_factory.mktemp("resumed"))
    assert experiment.run("train_vae") == 0 and resumed.run("train_vae", "vae.steps=3") == 0
    path = resumed.run_dir / "vae" / "state.pt"
    state = torch.load(path, weights_only=True)
    (state["optimizer"],) = state.pop("optimizers")
    save_tensors(path, state)
    assert resumed.run("train_vae") == 0
    one, two = (load_file(e.run_dir / "vae" / "vae.safetensors") for e in (experiment, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("damage", ["missing", "older"])
def test_stale_weights_of_a_finished_run_are_rewritten(trained, tmp_path, capsys, damage):
    """The process may have died after state.pt was written. The weights are restored from it without training."""
    experiment = copy_of(trained, tmp_path)
    weights = experiment.run_dir / "cosine" / "unet.safetensors"
    before, (tensors, metadata) = load_file(weights), load_weights(weights, "unet", "")
    weights.unlink()
    if damage == "older":
        save_weights(weights, {name: 0 * x for name, x in tensors.items()}, {**metadata, "step": 3, "complete": False})
    assert experiment.run("train_diffusion") == 0 and "already trained" in capsys.readouterr().out
    after = load_file(weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
    new_metadata = load_weights(weights, "unet", "")[1]
    assert {**new_metadata, "minutes": 0} == {**metadata, "minutes": 0}


@pytest.mark.parametrize("log_every", [2, 1000])
def test_a_signal_saves_and_the_same_command_resumes(experiment, trained, capsys, monkeypatch, log_every):
    step = Trainer.step

    def interrupted_step(self, forward_backward):
        if self.steps_done == 2:  # during the third step
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, forward_backward)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    assert experiment.run("train_vae", f"vae.log_every={log_every}") == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "stopped at step 3 of 6" in error and "run the same command to resume" in error
    assert torch.load(experiment.run_dir / "vae" / "state.pt", weights_only=True)["step"] == 3
    assert experiment.run("create_encodings") == 0
    assert "is from step 3 of 6; run train_vae.py again to finish training" in capsys.readouterr().out
    monkeypatch.undo()
    assert experiment.run("train_vae", "vae.retrain=true") == 0
    assert "after 6 steps" in capsys.readouterr().out
    uninterrupted, resumed = (load_file(e.run_dir / "vae" / "vae.safetensors") for e in (trained, experiment))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_a_second_interrupt_stops_without_saving(experiment, capsys, monkeypatch):
    step = Trainer.step

    def interrupted_step(self, forward_backward):
        if self.steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)
            assert self._signal == signal.SIGINT  # the first one only requests a stop after this step
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second interrupt was ignored")
        step(self, forward_backward)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    handler = signal.getsignal(signal.SIGINT)
    assert experiment.run("train_vae") == 130 and signal.getsignal(signal.SIGINT) is handler
    captured = capsys.readouterr()
    assert "stopping after this step (SIGINT)" in captured.out and captured.err.splitlines()[-1] == "interrupted"
    assert not (experiment.run_dir / "vae" / "state.pt").exists()
    monkeypatch.undo()
    assert experiment.run("train_vae") == 0 and "after 6 steps" in capsys.readouterr().out


def test_a_time_budget_ends_a_stage(experiment, capsys):
    budget = "vae.max_minutes=0.00001"
    assert experiment.run("train_vae", budget) == 0
    assert "after 1 steps" in capsys.readouterr().out
    assert experiment.run("train_vae", budget) == 0
    assert "already trained" in capsys.readouterr().out
    assert experiment.run("train_vae") == 0  # without the budget it resumes
    assert "after 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "max_minutes, expected", [(None, [10, 20, 30, 40]), (1.0, [10, 20, 30, 40]), (0.25, [16, 32, 48, 64])]
)
def test_progress_bar_counts_the_budget_that_ends_the_run(tmp_path, monkeypatch, max_minutes, expected):
    """10 steps of 2.4 s by a fake clock, with no, a larger and a smaller time budget. A resumed run continues the bar."""
    now = 0.0
    monkeypatch.setattr(trainer_module, "time", types.SimpleNamespace(monotonic=lambda: now))
    cfg = VAEConfig(steps=10, batch_size=2, max_minutes=max_minutes, micro_batch=2, log_every=1000)

    def make_trainer():
        torch.manual_seed(0)
        return Trainer(
            tmp_path, torch.nn.Linear(3, 1), cfg, identity={}, seed=0, logging=LoggingConfig(tensorboard=False),
            weights_name="vae.safetensors", metadata={"kind": "vae"},
        )  # fmt: skip

    percents = []
    for _ in range(2):
        with make_trainer() as trainer, contextlib.suppress(Stopped):
            percents.append(trainer._bar.n)

            def forward_backward(micro_batch):
                nonlocal now
                now += 2.4
                loss = trainer.net(torch.ones(2, 3)).square().mean(dim=1)
                trainer.backward(loss, loss)

            for _ in trainer:
                trainer.step(forward_backward)
                percents.append(trainer._bar.n)
                if trainer.steps_done in (2, 4):
                    os.kill(os.getpid(), signal.SIGTERM)
                    trainer._update_stop()
    assert trainer._bar.total == 100
    assert percents == pytest.approx([0, *expected[:2], expected[1], *expected[2:]])


def test_a_nonfinite_loss_keeps_the_last_good_state(trained, tmp_path, capsys, monkeypatch):
    import train_diffusion

    experiment = copy_of(trained, tmp_path)
    state = (experiment.run_dir / "cosine" / "state.pt").read_bytes()
    diffusion_loss = train_diffusion.diffusion_loss

    def nan_loss(unet, z, eps, t, *rest):
        loss = diffusion_loss(unet, z, eps, t, *rest)
        return torch.where(t == t[2], torch.nan, loss) if unet.training else loss

    monkeypatch.setattr(train_diffusion, "diffusion_loss", nan_loss)
    line = error_line(experiment, capsys, "train_diffusion", "diffusion.steps=12", code=1)
    torch.manual_seed(6)  # the seed of step 6: see Trainer.__iter__
    expected_t = int(torch.randint(0, 1000, (8,))[2])
    assert "step 6" in line and f"timestep {expected_t}" in line and "learning rate 0.0002" in line
    assert "the last saved state is kept" in line
    assert (experiment.run_dir / "cosine" / "state.pt").read_bytes() == state
    # A save before the next log line must not write the non-finite state either.
    error_line(
        experiment,
        capsys,
        "train_diffusion",
        "diffusion.steps=12",
        "diffusion.log_every=1000",
        "diffusion.save_minutes=1e-9",
        code=1,
    )
    assert (experiment.run_dir / "cosine" / "state.pt").read_bytes() == state


def test_a_full_disk_while_encodings_are_joined(experiment, capsys, monkeypatch):
    """One error line; the chunks stay, and the same command ends with the encodings of a run without the error."""

    def open_full(path, *args):
        if str(path).endswith(".joined"):
            return open("/dev/full", *args)  # every write fails with ENOSPC
        return open(path, *args)

    assert experiment.run("train_vae") == 0 and experiment.run("create_encodings") == 0
    path = experiment.run_dir / "encodings.pt"
    expected = LatentDataset.load(path)
    path.unlink()
    monkeypatch.setattr("dataset.chunks.open", open_full, raising=False)
    capsys.readouterr()
    assert experiment.run("create_encodings") == 2
    error = capsys.readouterr().err.strip().splitlines()
    error = [line for line in error if line.startswith("error: ")]
    assert len(error) == 1 and "no space left on the disk" in error[0], error
    assert not path.exists() and list(experiment.run_dir.glob("encodings.chunks-*/*.pt"))
    monkeypatch.undo()
    assert experiment.run("create_encodings") == 0
    loaded = LatentDataset.load(path)
    assert torch.equal(loaded.mean, expected.mean) and torch.equal(loaded.val_mean, expected.val_mean)
    assert not list(experiment.run_dir.glob("encodings.chunks-*"))


def test_a_full_disk_keeps_saved_files_and_training_continues(experiment, capsys, monkeypatch):
    assert experiment.run("train_vae", "vae.steps=2") == 0
    state = (experiment.run_dir / "vae" / "state.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    steps, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, f: (step(self, f), steps.append(self.steps_done)))
    line = error_line(experiment, capsys, "train_vae", "vae.save_minutes=1e-9")
    assert steps == [3, 4, 5, 6]  # only the last save is an error
    assert "no space left" in line and "run the same command again" in line
    assert (experiment.run_dir / "vae" / "state.pt").read_bytes() == state and not list(experiment.run_dir.rglob("*.tmp"))
    monkeypatch.undo()
    assert experiment.run("train_vae") == 0


def test_a_full_disk_turns_tensorboard_off_and_training_continues(experiment, capsys, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert experiment.run("train_vae", "logging.tensorboard=true") == 0
    assert capsys.readouterr().out.count("warning: TensorBoard cannot write") == 1


@pytest.mark.parametrize("second, saved", [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_second_signal(experiment, monkeypatch, second, saved):
    """Service managers and torchrun may both send SIGTERM; a second Ctrl-C ends without saving."""
    step = Trainer.step

    def interrupted_step(self, forward_backward):
        if self.steps_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), second)
        step(self, forward_backward)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    assert experiment.run("train_vae") == (143 if saved else 130)
    assert (experiment.run_dir / "vae" / "state.pt").exists() == saved


def test_a_small_disk_is_reported_before_training(experiment, capsys, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "MB are free" in error_line(experiment, capsys, "train_vae", "--dry-run")


def test_lines_logged_after_the_last_save_are_dropped(experiment):
    assert experiment.run("train_vae", "vae.steps=2") == 0
    metrics = experiment.run_dir / "vae" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "train/loss": 1}\n{"step": 6, "tra')
    assert experiment.run("train_vae") == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(5) == 0


# Sampling


def test_images_do_not_depend_on_the_batch_size(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    unet = experiment.run_dir / "cosine" / "unet.safetensors"
    tensors = load_file(unet)
    torch.manual_seed(0)
    for name, value in tensors.items():  # after six steps zero-initialized layers still have almost no effect
        if not name.startswith("normalizer."):
            value += 0.05 * torch.randn_like(value)
    save_weights(unet, tensors, load_weights(unet, "unet", "")[1])

    def sampled_grid(batch_size, sampler):
        results = tmp_path / f"results{batch_size}"
        options = f"sampling.batch_size={batch_size}", f"results_dir={results}", f"sampling.sampler={sampler}"
        assert experiment.run("infer", *options) == 0
        return np.asarray(Image.open(results / f"tiny_cosine_{sampler}_2x3.png")).astype(int)

    for sampler in ("ddim", "ancestral"):
        whole = sampled_grid(6, sampler)
        assert all(np.abs(whole - sampled_grid(batch_size, sampler)).max() <= 1 for batch_size in (4, 1))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_a_trajectory_strip_ends_with_the_images(trained, sampler):
    assert trained.run("infer", "sampling.trajectory_frames=3", f"sampling.sampler={sampler}") == 0
    results = trained.folder / "results"
    strip, grid = (np.asarray(Image.open(results / f"tiny_cosine_{sampler}_2x3{end}.png")) for end in ("_strip", ""))
    assert strip.shape == (6 * 18 - 2, 3 * 18 - 2, 3)  # six images, three frames of 16 with a gap of 2
    for i in range(6):
        assert np.array_equal(strip[18 * i : 18 * i + 16, 36:52], grid[i // 3 * 18 :, i % 3 * 18 :][:16, :16])
    assert not np.array_equal(strip[:16, :16], strip[:16, 36:52])
    gif = Image.open(results / f"tiny_cosine_{sampler}_2x3_strip.gif")
    assert gif.n_frames == 3 and gif.size == (6 * 18 - 2, 16)


def test_latent_stats_and_warnings():
    """Latents with half the training std in one of two channels."""
    torch.manual_seed(0)
    train = Normalizer.measure(torch.randn(400, 2, 4, 4), "global")
    moments, z = Moments(2), torch.randn(40, 2, 4, 4) * torch.tensor([1.0, 0.5])[:, None, None]
    for part in z.split(7):
        moments.add(part)
    assert moments.overall_std() == pytest.approx(float(z.std(correction=0)), rel=1e-6)
    stats = latent_stats(moments, train, 0.0, 0.0)
    assert stats["worst_channel"] == 1 and stats["worst_channel_ratio"] == pytest.approx(0.5, abs=0.03)
    assert stats["std_ratio"] == pytest.approx((0.625) ** 0.5, abs=0.03)
    cfg = load_config(None).sampling
    assert "smaller than in training" in std_warnings(stats, cfg)[0]
    narrow_clamp = cfg.model_copy(update={"x0_clamp": 1.0})
    assert "clamps the clean estimate too tightly" in std_warnings({**stats, "clamped": 0.1}, narrow_clamp)[0]
    assert "too tightly" not in std_warnings({**stats, "clamped": 0.1}, cfg)[0]  # cfg has the suggested x0_clamp=range
    assert std_warnings(dict(std_ratio=1.02, worst_channel_ratio=0.95, clamped=0.0), cfg) == []
    assert "larger than in training" in std_warnings(dict(std_ratio=1.3, worst_channel_ratio=1.3, clamped=0.0), cfg)[0]


# Files that do not belong together, and damaged or foreign files


def test_stages_out_of_order(experiment, trained, tmp_path, capsys):
    for stage in ("create_encodings", "train_diffusion", "infer"):
        assert "run train_vae.py first" in error_line(experiment, capsys, stage)
    vae_only = copy_of(trained, tmp_path / "vae_only")
    (vae_only.run_dir / "encodings.pt").unlink()
    shutil.rmtree(vae_only.run_dir / "cosine")
    assert "run create_encodings.py first" in error_line(vae_only, capsys, "train_diffusion")
    assert "run train_diffusion.py first" in error_line(vae_only, capsys, "infer")


def test_encodings_of_another_vae(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    assert experiment.run("train_vae", "vae.steps=8", "vae.retrain=true") == 0  # more steps: another VAE
    assert "was made with another VAE" in error_line(experiment, capsys, "train_diffusion")
    assert "was trained with another VAE" in error_line(experiment, capsys, "infer")
    assert experiment.run("create_encodings") == 0
    line = error_line(experiment, capsys, "train_diffusion", "diffusion.steps=8")  # trained on other encodings
    assert "other settings (encodings_fingerprint was" in line


def test_encodings_of_other_settings(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    assert "data.flip was True, now False" in error_line(experiment, capsys, "train_diffusion", "data.flip=false")
    assert experiment.run("create_encodings", "encodings.normalization=per_channel") == 0
    assert "trained on other encodings" in error_line(experiment, capsys, "infer")


def test_vae_of_other_images(trained, tmp_path, capsys):
    assert "trained on other images" in error_line(
        copy_of(trained, tmp_path), capsys, "create_encodings", "data.num_images=40"
    )


def test_resuming_with_other_settings(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    line = error_line(experiment, capsys, "train_vae", "vae.lr=1e-3", "vae.steps=9")
    assert "vae.lr was 0.0002, now 0.001" in line and "steps" not in line
    shutil.rmtree(experiment.run_dir.parent / "cache")
    for stage in ("train_vae", "train_diffusion"):  # before any image is read
        section = {"train_vae": "vae", "train_diffusion": "diffusion"}[stage]
        assert f"{section}.lr was" in error_line(experiment, capsys, stage, f"{section}.lr=1e-3", "--dry-run")
        assert experiment.run(stage, f"{section}.steps=9", "vae.retrain=true", "--dry-run") == 0
    assert not (experiment.run_dir.parent / "cache").exists()


@pytest.mark.parametrize(
    "stage, file",
    [
        ("create_encodings", "vae/vae.safetensors"),
        ("train_diffusion", "encodings.pt"),
        ("infer", "cosine/unet.safetensors"),
        ("train_vae", "vae/state.pt"),
        ("train_diffusion", "cosine/state.pt"),
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "hostile", "empty"])
def test_damaged_and_hostile_files(trained, tmp_path, capsys, stage, file, damage):
    experiment = copy_of(trained, tmp_path)
    path, canary = experiment.run_dir / file, tmp_path / "canary"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif file.endswith(".pt"):
        torch.save({"kind": "state", "x": Hostile(canary)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(canary)))
    line = error_line(experiment, capsys, stage)
    assert str(path) in line and "remove" in line
    assert not canary.exists()


def test_foreign_weights(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    path = experiment.run_dir / "vae" / "vae.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    assert "not made by this project (it has no checksum)" in error_line(experiment, capsys, "create_encodings")
    shutil.copy(experiment.run_dir / "cosine" / "unet.safetensors", path)
    assert "is not a vae weights file" in error_line(experiment, capsys, "infer")


# Contents of logs and files


def train_log(experiment, folder):
    lines = (experiment.run_dir / folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "train/loss" in line]


def random_vgg19(folder):
    """Write random weights of VGG19 up to relu3_1. Return the settings that use them as perceptual loss."""
    from torchvision.models import vgg

    layers = vgg.make_layers(vgg.cfgs["E"])[:12].state_dict()
    torch.save({f"features.{name}": value for name, value in layers.items()}, folder / "vgg19.pth")
    return ["vae.perceptual.net=vgg19", f"vae.perceptual.weights={folder}/vgg19.pth"]


def test_vae_loss_is_the_weighted_sum_of_its_terms(experiment, tmp_path):
    """reconstruction + weight · perceptual + kl_weight · min(1, (step+1)/kl_warmup) · nats_per_dim, in every step."""
    options = ["vae.kl_weight=0.5", "vae.kl_warmup=4", "vae.log_every=1", "vae.perceptual.weight=0.3"]
    assert experiment.run("train_vae", *options, *random_vgg19(tmp_path)) == 0
    lines = train_log(experiment, "vae")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        kl = 0.5 * min(1.0, line["step"] / 4) * line["train/nats_per_dim"]
        total = line["train/reconstruction"] + 0.3 * line["train/perceptual"] + kl
        assert line["train/loss"] == pytest.approx(total, rel=1e-4) and line["train/perceptual"] > 0
    last = json.loads((experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/perceptual"] > 0


@pytest.mark.parametrize("fraction, rows", [(0.25, [3, 7]), (0.3, [3, 7]), (0.5, [1, 3, 5, 7]), (0.01, [7])])
def test_perceptual_loss_on_a_fraction_of_the_batch(fraction, rows):
    """The mean over the batch is the mean over the chosen images, in one batch and summed over parts of it."""
    from train_vae import evenly_spaced_mask, perceptual_loss

    x, y = torch.rand(2, 8, 3, 4, 4)
    count = VAEConfig(batch_size=8, perceptual={"fraction": fraction}).perceptual_images
    mask, sizes = evenly_spaced_mask(8, count), []
    assert mask.nonzero().flatten().tolist() == rows

    def distance(a, b):
        sizes.append(len(a))
        return (a - b).square().mean(dim=(1, 2, 3))

    expected = (x - y)[rows].square().mean()
    torch.testing.assert_close(perceptual_loss(distance, x, y, mask, 8 / len(rows)).mean(), expected)
    assert sizes == [len(rows)]  # the others are not computed
    for n in (1, 3):  # with n = 1, all or none of a part are chosen
        parts = [
            perceptual_loss(distance, x[i : i + n], y[i : i + n], mask[i : i + n], 8 / len(rows)) for i in range(0, 8, n)
        ]
        torch.testing.assert_close(torch.cat(parts).mean(), expected)


def test_vae_with_perceptual_fraction(experiment, tmp_path):
    """It does not depend on micro-batches, and the loss is about that of the whole batch."""
    vgg19, logs = random_vgg19(tmp_path), []
    for name, micro_batch, fraction in (("half", 8, 0.5), ("parts", 3, 0.5), ("all", 8, 1)):
        options = [
            f"name={name}",
            f"vae.micro_batch={micro_batch}",
            f"vae.perceptual.fraction={fraction}",
            "vae.log_every=1",
        ]
        options += vgg19
        assert experiment.run("train_vae", *options) == 0
        lines = (experiment.run_dir.parent / name / "vae" / "metrics.jsonl").read_text().splitlines()
        logs.append([line for line in map(json.loads, lines) if "train/loss" in line])
    assert len(logs[0]) == 6
    for half, parts, all_images in zip(*logs):
        for metric in ("train/loss", "train/perceptual"):
            assert half[metric] == pytest.approx(parts[metric], rel=1e-3) and half[metric] > 0
            assert half[metric] == pytest.approx(all_images[metric], rel=0.3)


def test_settings_that_did_not_exist_count_as_their_defaults(trained, tmp_path, capsys):
    """A checkpoint from before vae.perceptual.fraction is resumed with its default, and not with another value."""
    experiment = copy_of(trained, tmp_path)
    path = experiment.run_dir / "vae" / "state.pt"
    state = torch.load(path, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["vae"]["perceptual"]["fraction"], identity["vae"]["kl_warmup"]
    save_tensors(path, {**state, "identity": json.dumps(identity)})
    assert experiment.run("train_vae") == 0
    assert "perceptual.fraction was 1.0, now 0.5" in error_line(
        experiment, capsys, "train_vae", "vae.perceptual.fraction=0.5"
    )


def test_min_snr_loss_is_weighted(trained, tmp_path, monkeypatch):
    """One step with min-SNR weights: the logged loss is the mean of weight(t) · unweighted loss."""
    import train_diffusion

    experiment, calls, diffusion_loss = copy_of(trained, tmp_path), [], train_diffusion.diffusion_loss

    def recorded_loss(unet, z, eps, t, *rest):
        loss = diffusion_loss(unet, z, eps, t, *rest)
        calls.append((t.clone(), loss.detach().clone()))
        return loss

    monkeypatch.setattr(train_diffusion, "diffusion_loss", recorded_loss)
    options = ["diffusion.name=snr", "diffusion.prediction=v", "diffusion.weighting=min_snr", "diffusion.min_snr_gamma=2"]
    assert experiment.run("train_diffusion", *options, "diffusion.log_every=1", "diffusion.steps=1") == 0
    (t, loss), (line,) = calls[0], train_log(experiment, "snr")
    snr = make_schedule("cosine").snr(t)
    weighted = (snr.clamp(max=2.0) / (snr + 1) * loss).mean()
    assert line["train/loss"] == pytest.approx(float(weighted), rel=1e-4)
    assert line["train/unweighted_loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


def test_preview_samples_log_latent_stats(trained):
    lines = map(json.loads, (trained.run_dir / "cosine" / "metrics.jsonl").read_text().splitlines())
    stats = [
        (line["step"], line["samples/std_ratio"], line["samples/clamped"]) for line in lines if "samples/std_ratio" in line
    ]
    # An untrained U-Net predicts eps = 0, so z0_hat = z_t / alpha is noise that the clamp bounds.
    assert [step for step, *_ in stats] == [3, 6] and all(0.5 < ratio < 3 and 0 < clamped < 1 for _, ratio, clamped in stats)


def test_weights_files_hold_the_ema_weights(trained):
    for folder, file in (("vae", "vae"), ("cosine", "unet")):
        weights = load_file(trained.run_dir / folder / f"{file}.safetensors")
        state = torch.load(trained.run_dir / folder / "state.pt", weights_only=True)
        assert all(torch.equal(weights[name], value) for name, value in state["ema"].items())
        assert not all(torch.equal(weights[name], value) for name, value in state["net"].items())


def test_encodings_of_images_and_mirror_images(trained):
    config = load_config(str(trained.config), trained.argv()[1:])
    vae, metadata = load_vae(config, torch.device("cpu"))
    images = load_images_for(config, metadata)
    stored = torch.load(trained.run_dir / "encodings.pt", weights_only=True)
    for split, name, mirrored in ((TRAIN, "mean", False), (TRAIN, "mean_flipped", True), (VAL, "val_mean", False)):
        pixels = images.pixels[images.rows(split)][:, :, :: -1 if mirrored else 1]
        x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(stored[name].float(), vae.encode(x).mean, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stored["mean"], stored["mean_flipped"], atol=0.01)


# Devices and data


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_cuda_without_cuda(experiment, capsys):
    assert "torch finds 0 CUDA devices" in error_line(experiment, capsys, "train_vae", "device=cuda")


def test_cublas_does_not_use_tf32():
    """Some containers turn TF32 on by an environment variable, and the updates of Muon are inaccurate in it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    pick_precision("bfloat16", torch.device("cpu"))
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("vae.micro_batch=3", "diffusion.micro_batch=3", "vae.grad_checkpointing=true", "diffusion.grad_checkpointing=true"),
        (
            "vae.adversarial.weight=0.1",
            "vae.adversarial.start=2",
            "vae.adversarial.width=8",
            "data.image_size=32",
            "diffusion.dropout=0.2",
        ),
        (
            "vae.adversarial.weight=0.1",
            "vae.adversarial.start=0",
            "vae.adversarial.width=8",
            "vae.attention=true",
            "vae.grad_checkpointing=true",
            "vae.micro_batch=3",
            "data.image_size=32",
        ),
        ("vae.perceptual.net=efficientnet_lite0", "data.image_size=32", "vae.optimizer=muon", "diffusion.optimizer=muon"),
        ("diffusion.condition=class", "sampling.guidance=2", "diffusion.bottleneck=transformer"),
        (
            "text.encoder=words",
            "diffusion.condition=text",
            "diffusion.cross_attn_resolutions=[4]",
            "sampling.prompts=[a man]",
        ),
    ],
)
def test_four_stages_on_cuda(experiment, capsys, changes):
    options = ("device=cuda", "precision=auto", *changes)
    experiment.train_all(*options)
    assert experiment.run("infer", *options) == 0 and experiment.run("infer", *options, "sampling.precision=auto") == 0
    out = capsys.readouterr().out
    assert "are not compiled" not in out and "without CUDA graphs" not in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batch_loader_with_data_that_does_not_fit_on_cuda(monkeypatch):
    monkeypatch.setattr(loader, "MAX_MEMORY_FRACTION", 0.0)
    array, rows = torch.randint(0, 256, (4000, 64, 64), dtype=torch.uint8), torch.randint(0, 4000, (50, 256))
    batches = loader.BatchLoader([array[:1000], array[1000:]], torch.device("cuda"))
    assert not batches.resident
    for now, following in zip(rows, rows[1:]):
        assert torch.equal(batches.batch(now, following).cpu(), array[now])


def test_missing_perceptual_weights_are_reported_before_training(experiment, capsys):
    line = error_line(
        experiment, capsys, "train_vae", "vae.perceptual.net=vgg19", "vae.perceptual.weights=nowhere.pth", "--dry-run"
    )
    assert "nowhere.pth is not a file" in line


def test_missing_data_is_one_line(experiment, capsys):
    assert "does not exist" in error_line(experiment, capsys, "train_vae", "data.source=folder", "data.path=nowhere")


def test_config_mistakes_are_one_line(experiment, capsys):
    line = error_line(experiment, capsys, "infer", "sampling.stesp=3", "vae.lr=fast")
    assert "did you mean sampling.steps?" in line and "vae.lr" in line


def test_out_of_memory_in_sampling_is_one_line(trained, capsys, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(UNet, "forward", out_of_memory)
    assert "use a smaller batch_size or, in training, micro_batch (CUDA out of memory" in error_line(
        trained, capsys, "infer", "sampling.rows=1"
    )


def test_a_model_too_large_for_the_memory_is_reported_before_training(experiment, capsys, monkeypatch):
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert "MB of memory on cpu, not counting activations" in error_line(experiment, capsys, "train_vae", "--dry-run")
