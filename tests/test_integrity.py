"""Damaged files, interrupted image caches, locks, leftovers, and the VAE that later stages depend on."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_pipeline import copy_of, error_line

from dataset import cache_format, image_cache
from dataset.encodings import LatentDataset
from dataset.image_cache import index_dataset, load_images
from evaluation.features import Features
from evaluation.generation import training_features
from models.unet import UNet
from pipeline.stage_files import load_vae, unet_path
from training.logger import plot_curves
from training.resume import require_same_run, run_identity
from utils import checksums, files
from utils.checkpoints import load_network, load_tensors, load_weights, save_tensors, save_weights
from utils.errors import UserError
from utils.settings import load_config

CPU = torch.device("cpu")


def config_of(experiment, *overrides):
    return load_config(str(experiment.config), experiment.argv(*overrides)[1:])


# Checksums


def test_every_changed_or_missing_byte_is_found(tmp_path):
    """All single-byte changes and all truncations of both formats, which their own libraries still read."""
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float16)}
    save_tensors(tmp_path / "x.pt", {**tensors, "text": "x" * 40, "nested": {"n": [1, 2]}})
    save_weights(tmp_path / "x.safetensors", tensors, {"kind": "vae", "settings": f'"{checksums.KEY}":"'})
    plain = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(plain["a"], tensors["a"]) and plain["nested"] == {"n": [1, 2]}
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], tensors["b"])
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        content = path.read_bytes()
        assert checksums.is_intact(path) and len(content) > 200
        for i, byte in enumerate(content):
            path.write_bytes(content[:i] + bytes([byte ^ 1 << i % 8]) + content[i + 1 :])
            assert not checksums.is_intact(path), i
            path.write_bytes(content[:i])
            assert not checksums.is_intact(path), i
        path.write_bytes(content + b"\0")
        assert not checksums.is_intact(path)


def test_a_buffer_boundary_inside_the_checksum(tmp_path, monkeypatch):
    save_tensors(tmp_path / "x.pt", {"a": torch.arange(100)})
    for size in (1, 7, 64):
        monkeypatch.setattr(checksums, "BUFFER_SIZE", size)
        assert checksums.is_intact(tmp_path / "x.pt")


# Damaged files


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zero(path):
    content = path.read_bytes()
    start = len(content) // 3
    block = bytes(min(512, len(content) - start))
    path.write_bytes(content[:start] + block + content[start + len(block) :])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "flipped bit": flip,
    "zeroed block": zero,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 64),
    "empty": lambda path: path.write_bytes(b""),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "random": lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)),
    "a folder": replace_by_folder,
    "another file": lambda path: shutil.copy(ROOT / "README.md", path),
}
LOADERS = {
    "runs/tiny/vae/vae.safetensors": lambda config: load_vae(config, CPU),
    "runs/tiny/cosine/unet.safetensors": lambda config: load_network(
        UNet, unet_path(config), "unet", "train_diffusion.py", CPU
    ),
    "runs/tiny/encodings.pt": lambda config: LatentDataset.load(config.run_dir / "encodings.pt"),
    "runs/tiny/vae/state.pt": lambda config: require_same_run(
        config.run_dir / "vae", run_identity(config, "vae"), config.vae
    ),
    **{f"runs/cache/*/{name}": load_images for name in (*cache_format.TABLES, cache_format.CHECKSUMS, "pixels.u8")},
}


@pytest.mark.parametrize("pattern", LOADERS)
def test_damaged_files_are_one_line_with_a_remedy(trained, tmp_path, pattern):
    experiment = copy_of(trained, tmp_path)
    config, (path,) = config_of(experiment), tmp_path.glob(pattern)
    LOADERS[pattern](config)
    content = path.read_bytes()
    for name, damage in DAMAGE.items():
        damage(path)
        if not path.exists() or path.is_dir() or path.read_bytes() != content:
            with pytest.raises(UserError, match="remove it and run|remove .* to start over") as error:
                LOADERS[pattern](config)
                pytest.fail(f"{name}: accepted")
            assert str(path) in str(error.value) or str(path.parent) in str(error.value), name
            assert "\n" not in str(error.value), name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(content)
    LOADERS[pattern](config)


def test_one_file_in_the_place_of_another(trained, tmp_path, capsys):
    """Files of this project with a valid checksum, but of another kind."""
    experiment = copy_of(trained, tmp_path)
    names = ("vae/vae.safetensors", "cosine/unet.safetensors", "encodings.pt", "vae/state.pt", "cosine/state.pt")
    stages = ("create_encodings", "infer", "train_diffusion", "train_vae", "train_diffusion")
    for name, stage in zip(names, stages):
        path = experiment.run_dir / name
        content = path.read_bytes()
        for other in names:
            if other != name:
                shutil.copy(trained.run_dir / other, path)
                assert str(path.parent) in error_line(experiment, capsys, stage), (name, other)
        path.write_bytes(content)


@pytest.mark.parametrize("slow", [False, True])
def test_training_on_damaged_pixels_saves_nothing(trained, tmp_path, capsys, monkeypatch, slow):
    """Also if the check ends after training: the save waits for it."""
    experiment = copy_of(trained, tmp_path)
    shutil.rmtree(experiment.run_dir)
    (pixels,) = tmp_path.glob("runs/cache/*/pixels.u8")
    flip(pixels)
    verify = cache_format.verify_pixels
    if slow:
        monkeypatch.setattr(cache_format, "verify_pixels", lambda *arguments: (time.sleep(1), verify(*arguments)))
    line = error_line(experiment, capsys, "train_vae", "vae.save_minutes=1e-9")
    assert str(pixels.parent) in line and "checksum of images" in line and "remove it and run the same command" in line
    assert not (experiment.run_dir / "vae" / "state.pt").exists()
    assert not (experiment.run_dir / "vae" / "vae.safetensors").exists()
    shutil.rmtree(pixels.parent)
    assert experiment.run("train_vae") == 0
    one, two = (load_file(e.run_dir / "vae" / "vae.safetensors") for e in (trained, experiment))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_encoding_damaged_pixels_writes_nothing(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    (pixels,) = tmp_path.glob("runs/cache/*/pixels.u8")
    encodings = experiment.run_dir / "encodings.pt"
    encodings.unlink()
    pixels.write_bytes(np.random.default_rng(0).bytes(pixels.stat().st_size))
    assert "remove it and run" in error_line(experiment, capsys, "create_encodings")
    assert not encodings.exists() and not list(experiment.run_dir.rglob("encodings.chunks-*/*.pt"))


def test_a_damaged_chunk_is_encoded_again(trained, tmp_path, monkeypatch):
    experiment = copy_of(trained, tmp_path)
    path = experiment.run_dir / "encodings.pt"
    before = torch.load(path, weights_only=True)
    path.unlink()
    monkeypatch.setattr("dataset.chunks.CHUNK", 20)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert experiment.run("create_encodings") == 130  # killed after encodings.pt was written, with all chunks left
    path.unlink()
    monkeypatch.undo()
    monkeypatch.setattr("dataset.chunks.CHUNK", 20)
    chunks = sorted(experiment.run_dir.glob("encodings.chunks-*/*.pt"))
    assert len(chunks) == 7
    flip(chunks[1])
    replace_times = [chunk.stat().st_mtime_ns for chunk in chunks]
    written = []
    monkeypatch.setattr(
        "dataset.chunks.save_tensors", lambda file, content: (written.append(file), save_tensors(file, content))
    )
    assert experiment.run("create_encodings") == 0 and written == [chunks[1]] and replace_times
    after = torch.load(path, weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in ("mean", "mean_flipped", "val_mean"))


def test_damaged_features_are_an_error(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    config = config_of(experiment)
    images = load_images(config)
    features, rows = Features("means", lambda x: x.float().mean(dim=(2, 3)), CPU), images.rows(0)
    of_other_tests = set(tmp_path.glob("runs/cache/features-*.pt"))
    expected = training_features(config, images, features, rows)
    features.forward = None  # read, not computed again
    assert torch.equal(training_features(config, images, features, rows), expected)
    (path,) = set(tmp_path.glob("runs/cache/features-*.pt")) - of_other_tests
    content = path.read_bytes()
    for damage in DAMAGE.values():
        damage(path)
        with pytest.raises(UserError, match="features-.*remove it and run the same command again"):
            training_features(config, images, features, rows)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(content)
    save_tensors(path, {"key": "of other images", "features": expected})
    with pytest.raises(UserError, match="does not contain the features of these images"):
        training_features(config, images, features, rows)


def test_infer_needs_only_the_fingerprint_of_encodings(trained, tmp_path, capsys):
    """infer.py does not read the latents. Encodings that it cannot identify are an error."""
    experiment = copy_of(trained, tmp_path)
    path = experiment.run_dir / "encodings.pt"
    for damage in ("truncated", "all zeros", "a folder"):
        DAMAGE[damage](path)
        assert str(path) in error_line(experiment, capsys, "infer", "--dry-run"), damage


def test_a_damaged_log_does_not_stop_training(experiment):
    assert experiment.run("train_vae", "vae.steps=2") == 0
    log = experiment.run_dir / "vae" / "metrics.jsonl"
    log.write_bytes(b'\xff\xfe{"step"\n5\n[1]\n{"step": "x"}\n' + log.read_bytes() + b'{"step": 2, "train/loss": "text"}\n')
    assert experiment.run("train_vae", "vae.steps=4") == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps[-1] == 4 and plot_curves(log.parent).exists()


def test_a_folder_in_the_place_of_an_output(experiment, capsys):
    for name in ("state.pt", "metrics.jsonl", "vae.safetensors"):
        (experiment.run_dir / "vae" / name).mkdir(parents=True)
        assert name in error_line(experiment, capsys, "train_vae")
        shutil.rmtree(experiment.run_dir)


# Interrupted image caches


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(image_cache, "BLOCK_SIZE", 3)
    monkeypatch.setattr(image_cache, "PREFETCH_BLOCKS", 2)


def folder_config(tmp_path, folder, runs, *overrides):
    return load_config(
        None, [f"runs_dir={tmp_path}/{runs}", "data.source=folder", f"data.path={folder}", "data.image_size=16", *overrides]
    )


def interrupted_build(config, after_blocks: int) -> Path:
    """Build a cache until the source raises KeyboardInterrupt; return the partial folder."""
    index = index_dataset(config)
    read, calls = index.source.read, []

    def interrupted_read(indices):
        calls.append(indices)
        if len(calls) > after_blocks:
            raise KeyboardInterrupt
        return read(indices)

    index.source.read = interrupted_read
    with pytest.raises(KeyboardInterrupt):
        index.load()
    return cache_format.partial_dir(index.cache_dir)


def cached_files(runs: Path) -> dict[str, bytes]:
    (cache_dir,) = [path for path in (runs / "cache").iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in cache_dir.iterdir()}


def change_journal(old: bytes, new: bytes):
    def change(folder):
        content = (folder / "journal").read_bytes()
        assert old in content
        (folder / "journal").write_bytes(content.replace(old, new, 1))

    return change


PARTIAL_DAMAGE = {  # -> number of blocks that are kept, of four
    "none": (lambda folder: None, 4),
    "flipped pixel": (lambda folder: flip(folder / "pixels.u8"), 2),
    "pixels without journal entry": (lambda folder: open(folder / "pixels.u8", "ab").write(b"123"), 4),
    "truncated pixels": (lambda folder: os.truncate(folder / "pixels.u8", 3 * 768), 1),
    "half a journal line": (lambda folder: os.truncate(folder / "journal", (folder / "journal").stat().st_size - 9), 3),
    "flipped journal": (change_journal(b'"num_images": 2', b'"num_images": 3'), 1),
    "journal of other bytes": (lambda folder: (folder / "journal").write_bytes(b"\xff\xfe\n\n{}"), 0),
    "no journal": (lambda folder: (folder / "journal").unlink(), 0),
    "killed while writing the tables": (lambda folder: (folder / ".meta.json.0a1b2c3d.tmp").write_text("x"), 4),
    "pixels are a folder": (lambda folder: replace_by_folder(folder / "pixels.u8"), 0),
}


@pytest.mark.parametrize("damage", PARTIAL_DAMAGE)
def test_a_resumed_cache_is_bitwise_equal(tmp_path, image_folder, small_blocks, monkeypatch, capsys, damage):
    """Image 4 of 20 is unreadable. Intact blocks of the interrupted build are not read again."""
    monkeypatch.setattr(image_cache, "MAX_DAMAGED_FRACTION", 0.1)
    (image_folder / "04.jpg").write_bytes(b"\xff\xd8 not an image")
    load_images(folder_config(tmp_path, image_folder, "uninterrupted"))
    config = folder_config(tmp_path, image_folder, "resumed")
    partial = interrupted_build(config, after_blocks=4)
    change, num_kept = PARTIAL_DAMAGE[damage]
    change(partial)
    index = index_dataset(config)
    read, indices_read = index.source.read, []
    index.source.read = lambda indices: (indices_read.extend(indices), read(indices))[1]
    capsys.readouterr()
    images = index.load()
    assert sorted(indices_read) == list(range(3 * num_kept, 20))
    assert cached_files(tmp_path / "uninterrupted") == cached_files(tmp_path / "resumed")
    images.verified.result()
    out = capsys.readouterr().out
    assert (f"continuing the image cache after {3 * num_kept} of 20 images" in out) == (num_kept > 0)
    assert "1 of 20 images cannot be read" in out  # reported again
    assert not partial.exists() and not list(partial.parent.glob(".*"))


SLOW_BUILD = """
import sys, time
sys.path.insert(0, {root!r})
from dataset import image_cache
from utils.settings import load_config
image_cache.BLOCK_SIZE, image_cache.PREFETCH_BLOCKS = 3, 2
index = image_cache.index_dataset(load_config(None, {overrides!r}))
read = index.source.read
index.source.read = lambda indices: (time.sleep(0.2), read(indices))[1]
index.load()
"""


def start_slow_build(config) -> tuple[subprocess.Popen, Path]:
    """Start another process that builds a cache; return when it has written two blocks."""
    overrides = [f"runs_dir={config.runs_dir}", "data.source=folder", f"data.path={config.data.path}", "data.image_size=16"]
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD.format(root=str(ROOT), overrides=overrides)])
    journal = cache_format.partial_dir(index_dataset(config).cache_dir) / "journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process, journal.parent


def test_a_killed_build_continues(tmp_path, image_folder, small_blocks, capsys):
    load_images(folder_config(tmp_path, image_folder, "uninterrupted"))
    config = folder_config(tmp_path, image_folder, "killed")
    process, partial = start_slow_build(config)
    process.kill()
    process.wait()
    assert partial.exists() and not partial.with_name(partial.stem[1:]).exists()
    load_images(config)
    assert "continuing the image cache after" in capsys.readouterr().out
    assert cached_files(tmp_path / "uninterrupted") == cached_files(tmp_path / "killed") and not partial.exists()


def test_a_second_process_waits_for_the_cache(tmp_path, image_folder, small_blocks, capsys):
    config = folder_config(tmp_path, image_folder, "runs")
    process, _ = start_slow_build(config)
    index = index_dataset(config)
    index.source.read = lambda indices: pytest.fail("read twice")
    index.load().verified.result()
    assert process.wait() == 0 and "waiting for another process" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs" / "cache").iterdir()] == [index.cache_dir.name]


def test_too_many_damaged_images_leave_no_partial_cache(tmp_path, image_folder, small_blocks):
    for i in range(10):
        (image_folder / f"{i:02d}.jpg").write_bytes(b"\xff\xd8 not an image")
    with pytest.raises(UserError, match="10 of 20 images cannot be read"):
        load_images(folder_config(tmp_path, image_folder, "runs"))
    assert [path.suffix for path in (tmp_path / "runs" / "cache").iterdir()] == [".txt"]


def test_other_caches_of_the_same_source_are_named(tmp_path, image_folder, capsys):
    config = folder_config(tmp_path, image_folder, "runs")
    load_images(config)
    first = index_dataset(config).cache_dir
    shutil.copytree(image_folder, tmp_path / "other")
    load_images(folder_config(tmp_path, tmp_path / "other", "runs"))
    assert "note:" not in capsys.readouterr().out
    os.utime(image_folder / "03.jpg")
    load_images(config)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert note.startswith(f"note: {first} (0 MB)") and note.endswith(f"rm -r {first}")


def test_a_file_in_the_place_of_the_cache(tmp_path, image_folder):
    config = folder_config(tmp_path, image_folder, "runs")
    cache_dir = index_dataset(config).cache_dir
    cache_dir.parent.mkdir(parents=True)
    cache_dir.write_text("x")
    with pytest.raises(UserError, match="is a file, but should be the folder of the image cache: remove it"):
        load_images(config)


# Locks and leftovers

HOLD_LOCKS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from utils.locks import lock_folder
for name in ("vae", "", "cosine"):
    lock_folder(Path({run_dir!r}) / name)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused(trained, tmp_path, capsys):
    """Until the first one ends, even if it is killed."""
    experiment = copy_of(trained, tmp_path)
    (experiment.run_dir / "encodings.pt").rename(tmp_path / "encodings.pt")
    code = HOLD_LOCKS.format(root=str(ROOT), run_dir=str(experiment.run_dir))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"

    def refused(stage, folder):
        line = error_line(experiment, capsys, stage)
        expected = f"{experiment.run_dir / folder} is in use by another run (process {process.pid} on "
        return expected in line and "choose another name" in line

    assert refused("train_vae", "vae") and refused("create_encodings", "")
    (tmp_path / "encodings.pt").rename(experiment.run_dir / "encodings.pt")
    assert refused("train_diffusion", "cosine")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (experiment.run_dir / "encodings.pt").unlink()
    for stage in ("train_vae", "create_encodings", "train_diffusion"):
        assert experiment.run(stage) == 0
    assert not list(experiment.run_dir.rglob(".lock"))


def test_a_lock_is_released_after_an_error(experiment, capsys, monkeypatch):
    monkeypatch.setattr(image_cache, "build_cache", lambda _: (_ for _ in ()).throw(UserError("no images")))
    assert "no images" in error_line(experiment, capsys, "train_vae")
    monkeypatch.undo()
    assert experiment.run("train_vae") == 0


def test_temporary_files_of_dead_processes_are_removed(trained, tmp_path):
    experiment = copy_of(trained, tmp_path)
    dead = [experiment.run_dir / "cosine" / ".state.pt.12345.tmp", experiment.run_dir / ".encodings.pt.0a1b2c3d.tmp"]
    dead += [experiment.run_dir / "cosine" / "samples" / ".step_0000003.png.0a1b2c3d.tmp"]
    dead += [tmp_path / "results" / ".x.png.0a1b2c3d.tmp", tmp_path / "results" / "x" / ".000000.png.0a1b2c3d.tmp"]
    dead += [tmp_path / "runs" / "cache" / ".features-01.pt.0a1b2c3d.tmp"]
    other = [experiment.run_dir / "cosine" / "notes.tmp", tmp_path / "results" / ".notes.tmp"]
    for path in dead + other:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (live,) = [experiment.run_dir / "vae" / ".live.pt.0a1b2c3d.tmp"]
    with open(live, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert experiment.run("infer", "--dry-run") == 0 and all(path.exists() for path in dead)
        assert experiment.run("infer", "sampling.rows=1", "sampling.cols=1") == 0
        assert live.exists()
    assert not any(path.exists() for path in dead) and all(path.exists() for path in other)


def test_a_file_that_is_being_written_is_not_removed(tmp_path):
    writing, done = threading.Event(), threading.Event()

    def slow_write(temporary):
        temporary.write_text("content")
        writing.set()
        done.wait(10)

    thread = threading.Thread(target=files.write_atomically, args=(tmp_path / "x", slow_write))
    thread.start()
    writing.wait(10)
    files.remove_leftovers(tmp_path)
    done.set()
    thread.join()
    assert (tmp_path / "x").read_text() == "content" and len(list(tmp_path.iterdir())) == 1


# A VAE that later stages depend on


def test_retraining_a_vae_that_is_in_use_is_refused(trained, tmp_path, capsys):
    experiment = copy_of(trained, tmp_path)
    vae, unet = experiment.run_dir / "vae" / "vae.safetensors", experiment.run_dir / "cosine" / "unet.safetensors"
    encodings, before = experiment.run_dir / "encodings.pt", vae.read_bytes()
    assert experiment.run("train_vae") == 0 and experiment.run("train_vae", "vae.steps=4") == 0  # nothing to train
    for options in (("vae.steps=8",), ("vae.steps=8", "--dry-run")):
        line = error_line(experiment, capsys, "train_vae", *options)
        assert all(str(path) in line for path in (vae, unet, encodings)) and "vae.retrain=true" in line
    encodings.unlink()
    line = error_line(experiment, capsys, "train_vae", "vae.steps=8")
    assert str(unet) in line and str(encodings) not in line
    (experiment.run_dir / "vae" / "state.pt").unlink()  # starting over changes the weights too
    assert "vae.retrain=true" in error_line(experiment, capsys, "train_vae")
    assert vae.read_bytes() == before
    assert experiment.run("train_vae", "vae.steps=8", "vae.retrain=true") == 0 and vae.read_bytes() != before
    assert experiment.run("train_vae", "vae.steps=9") == 0  # nothing depends on these weights


def test_an_intact_state_restores_damaged_weights(trained, tmp_path):
    """The remedy in the error message: remove the weights and run the stage again. Nothing is trained."""
    experiment = copy_of(trained, tmp_path)
    vae = experiment.run_dir / "vae" / "vae.safetensors"
    before = load_file(vae)
    vae.unlink()
    assert experiment.run("train_vae") == 0
    assert all(torch.equal(before[name], value) for name, value in load_file(vae).items())
    assert load_tensors(experiment.run_dir / "vae" / "state.pt", "")["step"] == load_weights(vae, "vae", "")[1]["step"] == 6
