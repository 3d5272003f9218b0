"""The four scripts by their main(argv), end to end on tiny synthetic data, and what happens when things go wrong."""

import errno
import importlib.machinery
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

from dataset.encodings import LatentDataset
from models.schedules import make_schedule
from models.unet import UNet
from pipeline.latent_diffusion import load_images_for, load_vae
from utils.settings import load_config


def fails(experiment, capsys, stage, *overrides, code=2) -> str:
    """Run a stage that must fail: the exit code, one line, no traceback. Returns the line."""
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


def test_four_stages_leave_what_they_promise(trained, capsys):
    assert trained.run("infer", "sampling.save_images=true") == 0
    out = capsys.readouterr().out
    assert (
        "calibration: generated/training std" in out
        and "of clean estimates clamped" in out
        and "of pixels out of range" in out
    )
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
    assert json.loads(grid.text["config"])["sampling"]["steps"] == 4 and "std_ratio" in json.loads(grid.text["calibration"])
    singles = sorted((trained.folder / "results" / "tiny_cosine_ddim_2x3").iterdir())
    assert len(singles) == 6
    assert np.array_equal(np.asarray(Image.open(singles[4])), np.asarray(grid)[18:, 18:34])  # row 1, column 1


def test_metrics_have_what_a_reader_needs(trained):
    lines = [json.loads(line) for line in (trained.run_dir / "cosine" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    last = [line for line in lines if "val/loss" in line][-1]
    bins = [last[f"val/loss_bin{b}"] for b in range(10)]
    assert last["val/loss"] == pytest.approx(sum(bins) / 10) and last["images_seen"] == 48
    vae = [json.loads(line) for line in (trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert {"val/psnr", "val/ssim", "val/nats_per_dim"} <= vae[-1].keys()


def test_again_does_nothing_twice(trained, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in trained.run_dir.rglob("*.safetensors")} | {
        "e": (trained.run_dir / "encodings.pt").stat().st_mtime_ns
    }
    monkeypatch.setattr(run.Run, "take_step", lambda *_, **__: pytest.fail("trained twice"))
    trained.train_all()
    out = capsys.readouterr().out
    assert out.count("already trained") == 2 and "up to date" in out
    assert before == {p: p.stat().st_mtime_ns for p in trained.run_dir.rglob("*.safetensors")} | {
        "e": (trained.run_dir / "encodings.pt").stat().st_mtime_ns
    }


def test_other_labels_need_new_encodings_and_no_new_vae(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    (path,) = experiment.folder.glob("runs/cache/*/labels.npy")
    np.save(path, 1 - np.load(path).clip(0, 1))
    assert experiment.run("create_encodings") == 0
    encodings = LatentDataset.load(experiment.run_dir / "encodings.pt")
    assert torch.equal(torch.cat([encodings.labels, encodings.val_labels]), torch.from_numpy(np.load(path)))


def test_linear_lives_beside_cosine(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    vae = (experiment.run_dir / "vae" / "vae.safetensors").read_bytes()
    assert experiment.run("train_diffusion", "diffusion.schedule=linear") == 0
    assert experiment.run("infer", "diffusion.schedule=linear") == 0 and experiment.run("infer") == 0
    assert {p.name for p in (tmp_path / "results").glob("*.png")} >= {"tiny_linear_ddim_2x3.png", "tiny_cosine_ddim_2x3.png"}
    assert (experiment.run_dir / "vae" / "vae.safetensors").read_bytes() == vae


def test_dry_run_plans_and_writes_nothing(experiment, capsys):
    assert experiment.run("train_vae", "--dry-run") == 0
    out = capsys.readouterr().out
    for part in ("parameters", "48 for training", "6 of 8 images", "vae.safetensors"):
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


def test_tensorboard_and_wandb_are_written_where_asked(experiment, monkeypatch):
    """wandb is stood in for: what it is called with is what a user would see."""
    fake, calls = types.ModuleType("wandb"), []
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **options: (calls.append(("init", options["id"])), fake)[1]
    fake.log = lambda figures, step: calls.append(("log", step, sorted(figures)))
    fake.Image, fake.finish = (lambda image: image), (lambda: calls.append(("finish",)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert experiment.run("train_vae", "logging.tensorboard=true", "logging.wandb=true") == 0
    assert calls[0] == ("init", (experiment.run_dir / "vae" / "wandb_id").read_text()) and calls[-1] == ("finish",)
    assert {step for kind, step, names in calls[1:-1] if "train/loss" in names} == {2, 4, 6}
    assert {step for kind, step, names in calls[1:-1] if names == ["reconstructions"]} == {3, 6}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(experiment.run_dir / "vae" / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Images("reconstructions")] == [3, 6]


# Resuming


def test_resuming_is_bitwise_the_same(experiment, tmp_path_factory):
    """8 steps = 5 steps + resume + 3 steps, for both stages, with dropout and flips; the epoch ends after step 6."""
    longer = ("vae.steps=8", "diffusion.steps=8", "diffusion.dropout=0.3")
    experiment.train_all(*longer)
    other = Experiment(tmp_path_factory.mktemp("resumed"))
    for stage, folder, file in (("train_vae", "vae", "vae.safetensors"), ("train_diffusion", "cosine", "unet.safetensors")):
        section = "vae" if folder == "vae" else "diffusion"
        assert other.run(stage, *longer, f"{section}.steps=5") == 0
        assert other.run(stage, *longer) == 0
        if folder == "vae":
            assert other.run("create_encodings", *longer) == 0
        one, two = load_file(experiment.run_dir / folder / file), load_file(other.run_dir / folder / file)
        assert all(torch.equal(one[name], two[name]) for name in one)
        states = [torch.load(e.run_dir / folder / "state.pt", weights_only=True) for e in (experiment, other)]
        assert all(torch.equal(states[0]["net"][name], states[1]["net"][name]) for name in states[0]["net"])
        assert torch.equal(*(state["optimizer"]["state"][0]["exp_avg_sq"] for state in states))


def test_weights_cut_off_before_their_state_are_made_again(trained, tmp_path, capsys):
    """A finished run whose weights file is missing writes it again without training."""
    experiment = copy_of(trained, tmp_path)
    weights = experiment.run_dir / "cosine" / "unet.safetensors"
    before = load_file(weights)
    weights.unlink()
    assert experiment.run("train_diffusion") == 0 and "already trained" in capsys.readouterr().out
    after = load_file(weights)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("log_every", [2, 1000])
def test_a_signal_saves_and_the_same_command_goes_on(experiment, capsys, monkeypatch, log_every):
    original = run.Run.take_step

    def interrupted(self, *args, **kwargs):
        if self.step == 2:  # during the third step
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args, **kwargs)

    monkeypatch.setattr(run.Run, "take_step", interrupted)
    assert experiment.run("train_vae", f"vae.log_every={log_every}") == 128 + signal.SIGTERM
    assert "stopped at step 3 of 6" in capsys.readouterr().err
    assert torch.load(experiment.run_dir / "vae" / "state.pt", weights_only=True)["step"] == 3
    assert experiment.run("create_encodings") == 0
    assert "stopped at step 3 of 6" in capsys.readouterr().out  # a note: this VAE is not finished
    monkeypatch.undo()
    assert experiment.run("train_vae") == 0
    assert "after 6 steps" in capsys.readouterr().out


def test_a_time_budget_ends_a_stage_cleanly(experiment, capsys):
    budget = "vae.max_minutes=0.00001"
    assert experiment.run("train_vae", budget) == 0
    assert "after 1 steps" in capsys.readouterr().out
    assert experiment.run("train_vae", budget) == 0
    assert "already trained" in capsys.readouterr().out
    assert experiment.run("train_vae") == 0  # without the budget it goes on
    assert "after 6 steps" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(experiment, trained, tmp_path, capsys, monkeypatch):
    experiment = copy_of(trained, tmp_path)
    state = (experiment.run_dir / "cosine" / "state.pt").read_bytes()
    import train_diffusion

    original = train_diffusion.diffusion_loss

    def poisoned(unet, z, eps, t, *rest):
        loss = original(unet, z, eps, t, *rest)
        return torch.where(t == t[2], torch.nan, loss) if unet.training else loss

    monkeypatch.setattr(train_diffusion, "diffusion_loss", poisoned)
    line = fails(experiment, capsys, "train_diffusion", "diffusion.steps=12", code=1)
    torch.manual_seed(6)  # what step 6 drew: see Run.seed_step
    expected_t = int(torch.randint(0, 1000, (8,))[2])
    assert "step 6" in line and f"timestep {expected_t}" in line and "learning rate 0.0002" in line and "kept" in line
    assert (experiment.run_dir / "cosine" / "state.pt").read_bytes() == state
    # A save that comes before the next report must not write the broken state either.
    fails(
        experiment,
        capsys,
        "train_diffusion",
        "diffusion.steps=12",
        "diffusion.log_every=1000",
        "diffusion.save_minutes=1e-9",
        code=1,
    )
    assert (experiment.run_dir / "cosine" / "state.pt").read_bytes() == state


def test_a_disk_that_fills_up_loses_nothing(experiment, capsys, monkeypatch):
    assert experiment.run("train_vae", "vae.steps=2") == 0
    state = (experiment.run_dir / "vae" / "state.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    steps, original = [], run.Run.take_step
    monkeypatch.setattr(run.Run, "take_step", lambda self, *a, **k: (original(self, *a, **k), steps.append(self.step)))
    line = fails(experiment, capsys, "train_vae", "vae.save_minutes=1e-9")
    assert steps == [3, 4, 5, 6]  # it went on as long as there was work, and failed at the last save
    assert "no space left" in line and "run the same command again" in line
    assert (experiment.run_dir / "vae" / "state.pt").read_bytes() == state and not list(experiment.run_dir.rglob("*.tmp"))
    monkeypatch.undo()
    assert experiment.run("train_vae") == 0


def test_a_disk_too_small_is_found_before_the_work(experiment, capsys, monkeypatch):
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "MB are free" in fails(experiment, capsys, "train_vae", "--dry-run")


def test_lines_logged_after_the_last_save_are_dropped(experiment):
    assert experiment.run("train_vae", "vae.steps=2") == 0
    metrics = experiment.run_dir / "vae" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "train/loss": 1}\n{"step": 6, "tra')
    assert experiment.run("train_vae") == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(5) == 0


# Sampling


def test_the_same_picture_in_any_batch_size(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    unet = experiment.run_dir / "cosine" / "unet.safetensors"
    tensors = load_file(unet)
    torch.manual_seed(0)
    for name, value in tensors.items():  # a U-Net of six steps is nearly zero at its ends: make every layer matter
        if not name.startswith("normalizer."):
            value += 0.05 * torch.randn_like(value)
    artifacts.save_weights(unet, tensors, artifacts.load_weights(unet, "unet", "")[1])

    def pictures(batch_size, sampler):
        results = tmp_path / f"results{batch_size}"
        options = f"sampling.batch_size={batch_size}", f"results_dir={results}", f"sampling.sampler={sampler}"
        assert experiment.run("infer", *options) == 0
        return np.asarray(Image.open(results / f"tiny_cosine_{sampler}_2x3.png")).astype(int)

    for sampler in ("ddim", "ancestral"):
        whole = pictures(6, sampler)
        assert np.abs(whole - pictures(4, sampler)).max() <= 1 and np.abs(whole - pictures(1, sampler)).max() <= 1


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_a_strip_goes_from_noise_to_the_picture(trained, sampler):
    assert trained.run("infer", "sampling.trajectory_frames=3", f"sampling.sampler={sampler}") == 0
    results = trained.folder / "results"
    strip, grid = (np.asarray(Image.open(results / f"tiny_cosine_{sampler}_2x3{end}.png")) for end in ("_strip", ""))
    assert strip.shape == (6 * 18 - 2, 3 * 18 - 2, 3)  # six images, three frames of 16 with a gap of 2
    for i in range(6):
        assert np.array_equal(strip[18 * i : 18 * i + 16, 36:52], grid[i // 3 * 18 :, i % 3 * 18 :][:16, :16])
    assert not np.array_equal(strip[:16, :16], strip[:16, 36:52])
    gif = Image.open(results / f"tiny_cosine_{sampler}_2x3_strip.gif")
    assert gif.n_frames == 3 and gif.size == (6 * 18 - 2, 16)


def test_calibration_by_hand():
    from models.normalizer import Normalizer
    from pipeline.latent_stats import Moments, advice, calibration
    from utils.settings import load_config

    torch.manual_seed(0)
    train = Normalizer.measure(torch.randn(400, 2, 4, 4), "global")
    moments, z = Moments(2), torch.randn(40, 2, 4, 4) * torch.tensor([1.0, 0.5])[:, None, None]
    for part in z.split(7):
        moments.add(part)
    assert moments.overall_std() == pytest.approx(float(z.std(correction=0)), rel=1e-6)
    figures = calibration(moments, train, 0.0, 0.0)
    assert figures["worst_channel"] == 1 and figures["worst_channel_ratio"] == pytest.approx(0.5, abs=0.03)
    assert figures["std_ratio"] == pytest.approx((0.625) ** 0.5, abs=0.03)
    s = load_config(None).sampling
    assert "narrower" in advice(figures, s)[0]
    narrow = s.model_copy(update={"x0_clamp": 1.0})
    assert "clamped too hard" in advice({**figures, "clamped": 0.1}, narrow)[0]
    assert "clamped too hard" not in advice({**figures, "clamped": 0.1}, s)[0]  # the remedy itself
    assert advice(dict(std_ratio=1.02, worst_channel_ratio=0.95, clamped=0.0), s) == []
    assert "wider" in advice(dict(std_ratio=1.3, worst_channel_ratio=1.3, clamped=0.0), s)[0]


# Artefacts that do not belong together, and files that are not what they should be


def test_stages_out_of_order(experiment, trained, tmp_path, capsys):
    for stage in ("create_encodings", "train_diffusion", "infer"):
        assert "run train_vae.py first" in fails(experiment, capsys, stage)
    vae_only = copy_of(trained, tmp_path / "vae_only")
    (vae_only.run_dir / "encodings.pt").unlink()
    shutil.rmtree(vae_only.run_dir / "cosine")
    assert "run create_encodings.py first" in fails(vae_only, capsys, "train_diffusion")
    assert "run train_diffusion.py first" in fails(vae_only, capsys, "infer")


def test_encodings_of_another_vae(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    assert experiment.run("train_vae", "vae.steps=8") == 0  # trained on: another VAE now
    assert "made by another VAE" in fails(experiment, capsys, "train_diffusion")
    assert "encodings of another VAE" in fails(experiment, capsys, "infer")
    assert experiment.run("create_encodings") == 0
    line = fails(experiment, capsys, "train_diffusion", "diffusion.steps=8")  # a U-Net of other encodings
    assert "other settings (encodings_fingerprint was" in line


def test_encodings_of_other_settings(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    assert "data.flip was True, now False" in fails(experiment, capsys, "train_diffusion", "data.flip=false")
    assert experiment.run("create_encodings", "encodings.normalization=per_channel") == 0
    assert "trained on other encodings" in fails(experiment, capsys, "infer")


def test_vae_of_other_images(trained, tmp_path, capsys):
    assert "trained on other images" in fails(copy_of(trained, tmp_path), capsys, "create_encodings", "data.num_images=40")


def test_resuming_with_other_settings(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    line = fails(experiment, capsys, "train_vae", "vae.lr=1e-3", "vae.steps=9")
    assert "vae.lr was 0.0002, now 0.001" in line and "steps" not in line
    shutil.rmtree(experiment.run_dir.parent / "cache")
    for stage in ("train_vae", "train_diffusion"):  # before any picture is read
        section = {"train_vae": "vae", "train_diffusion": "diffusion"}[stage]
        assert f"{section}.lr was" in fails(experiment, capsys, stage, f"{section}.lr=1e-3", "--dry-run")
        assert experiment.run(stage, f"{section}.steps=9", "--dry-run") == 0
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
    line = fails(experiment, capsys, stage)
    assert str(path) in line and "remov" in line
    assert not canary.exists()


def test_foreign_weights(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    path = experiment.run_dir / "vae" / "vae.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    assert "is not a vae weights file" in fails(experiment, capsys, "create_encodings")
    shutil.copy(experiment.run_dir / "cosine" / "unet.safetensors", path)
    assert "is not a vae weights file" in fails(experiment, capsys, "infer")


# What is logged and stored is what it is called


def logged(experiment, folder):
    lines = (experiment.run_dir / folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "train/loss" in line]


def test_the_vaes_loss_is_the_sum_of_its_parts(experiment, tmp_path):
    """reconstruction + weight · perceptual + kl_weight · min(1, (step+1)/kl_warmup) · nats, step by step."""
    from torchvision.models import vgg

    layers = vgg.make_layers(vgg.cfgs["E"])[:12].state_dict()  # VGG19 up to relu3_1
    torch.save({f"features.{name}": value for name, value in layers.items()}, tmp_path / "vgg19.pth")
    options = ["vae.kl_weight=0.5", "vae.kl_warmup=4", "vae.log_every=1", "vae.perceptual.weight=0.3"]
    vgg19 = ["vae.perceptual.net=vgg19", f"vae.perceptual.weights={tmp_path}/vgg19.pth"]
    assert experiment.run("train_vae", *options, *vgg19) == 0
    lines = logged(experiment, "vae")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        kl = 0.5 * min(1.0, line["step"] / 4) * line["train/nats_per_dim"]
        parts = line["train/reconstruction"] + 0.3 * line["train/perceptual"] + kl
        assert line["train/loss"] == pytest.approx(parts, rel=1e-4) and line["train/perceptual"] > 0
    last = json.loads((experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/perceptual"] > 0


def test_the_weighted_loss_is_weighted(trained, tmp_path, monkeypatch):
    """One step under min-SNR: the logged loss is the mean of weight(t) · unweighted loss."""
    import train_diffusion

    experiment, seen, inner = copy_of(trained, tmp_path), [], train_diffusion.diffusion_loss

    def watched(unet, z, eps, t, alphas, sigmas, prediction, cond=None):
        loss = inner(unet, z, eps, t, alphas, sigmas, prediction, cond)
        seen.append((t.clone(), loss.detach().clone()))
        return loss

    monkeypatch.setattr(train_diffusion, "diffusion_loss", watched)
    options = ["diffusion.name=snr", "diffusion.prediction=v", "diffusion.weighting=min_snr", "diffusion.min_snr_gamma=2"]
    assert experiment.run("train_diffusion", *options, "diffusion.log_every=1", "diffusion.steps=1") == 0
    (t, loss), (line,) = seen[0], logged(experiment, "snr")
    snr = make_schedule("cosine").snr(t)
    weighted = (snr.clamp(max=2.0) / (snr + 1) * loss).mean()
    assert line["train/loss"] == pytest.approx(float(weighted), rel=1e-4)
    assert line["train/unweighted_loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


def test_samples_while_training_are_calibrated(trained):
    lines = map(json.loads, (trained.run_dir / "cosine" / "metrics.jsonl").read_text().splitlines())
    found = [
        (line["step"], line["samples/std_ratio"], line["samples/clamped"]) for line in lines if "samples/std_ratio" in line
    ]
    # An untrained U-Net says eps = 0, and so z0_hat = z_t / alpha: all noise, until the clamp bounds it.
    assert [step for step, *_ in found] == [3, 6] and all(0.5 < ratio < 3 and 0 < clamped < 1 for _, ratio, clamped in found)


def test_weights_files_hold_the_average(trained):
    """Both are those of EMA, not of the network that learns."""
    for folder, file in (("vae", "vae"), ("cosine", "unet")):
        weights = load_file(trained.run_dir / folder / f"{file}.safetensors")
        state = torch.load(trained.run_dir / folder / "state.pt", weights_only=True)
        assert all(torch.equal(weights[name], value) for name, value in state["ema"].items())
        assert not all(torch.equal(weights[name], value) for name, value in state["net"].items())


def test_encodings_are_of_the_pictures_and_of_their_mirrors(trained):
    config = load_config(str(trained.config), trained.argv()[1:])
    vae, header = load_vae(config, torch.device("cpu"))
    images = load_images_for(config, header)
    stored = torch.load(trained.run_dir / "encodings.pt", weights_only=True)
    for split, name, mirrored in ((0, "mean", False), (0, "mean_flipped", True), (1, "val", False)):
        pixels = images.pixels[images.rows(split)][:, :, :: -1 if mirrored else 1]
        x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(stored[name].float(), vae.encode(x).mean, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(stored["mean"], stored["mean_flipped"], atol=0.01)


# Devices and data


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(experiment, capsys):
    assert "torch finds 0 CUDA devices" in fails(experiment, capsys, "train_vae", "device=cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
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
        ("diffusion.condition=class", "sampling.guidance=2", "diffusion.bottleneck=transformer"),
        ("text.encoder=words", "diffusion.condition=text", "diffusion.cross_attn_resolutions=[4]", "sampling.prompts=[a man]"),
    ],
)
def test_four_stages_on_cuda(experiment, capsys, changes):
    options = ("device=cuda", "precision=auto", *changes)
    experiment.train_all(*options)
    assert experiment.run("infer", *options) == 0 and experiment.run("infer", *options, "sampling.precision=auto") == 0
    out = capsys.readouterr().out
    assert "nothing is compiled" not in out and "without a CUDA graph" not in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_feed_that_does_not_fit_on_cuda(monkeypatch):
    monkeypatch.setattr(feed, "MAX_MEMORY_FRACTION", 0.0)
    array, rows = torch.randint(0, 256, (4000, 64, 64), dtype=torch.uint8), torch.randint(0, 4000, (50, 256))
    latents = feed.BatchLoader([array[:1000], array[1000:]], torch.device("cuda"))
    for now, then in zip(rows, rows[1:]):
        assert torch.equal(latents.take(now, then).cpu(), array[now])


def test_missing_perceptual_weights_before_any_work(experiment, capsys):
    line = fails(
        experiment, capsys, "train_vae", "vae.perceptual.net=vgg19", "vae.perceptual.weights=nowhere.pth", "--dry-run"
    )
    assert "nowhere.pth is not a file" in line


def test_bad_data_is_one_line(experiment, capsys):
    assert "does not exist" in fails(experiment, capsys, "train_vae", "data.source=folder", "data.path=nowhere")


def test_config_mistakes_are_one_line(experiment, capsys):
    line = fails(experiment, capsys, "infer", "sampling.stesp=3", "vae.lr=fast")
    assert "did you mean sampling.steps?" in line and "vae.lr" in line


def test_out_of_memory_outside_of_training_is_one_line(trained, capsys, monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(UNet, "forward", none)
    assert "use a smaller batch_size, or micro_batch in training (CUDA out of memory" in fails(
        trained, capsys, "infer", "sampling.rows=1"
    )


def test_a_model_too_large_for_the_memory_is_found_before_the_work(experiment, capsys, monkeypatch):
    monkeypatch.setattr(feed.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert "of memory are needed on cpu" in fails(experiment, capsys, "train_vae", "--dry-run")
