"""Fault injection: damaged files, killed processes, a full disk and bad input, at random from a printed seed.

    python benchmarks/faults.py [minutes] [seed]

A fault is detected if the script ends with one error line and exit code 2, and survived if the results equal those of a run
without faults. Everything else is a violation: another exception, a hang, another result. Exit code 1 if there are any.
"""

import contextlib
import errno
import fcntl
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Callable

os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # threads do not survive fork()

from timing import machine, print_table

# isort: split
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import create_encodings
import infer
import train_diffusion
import train_vae
from dataset import cache_format, chunks, image_cache
from dataset.encodings import LatentDataset
from dataset.image_cache import index_dataset, load_images
from utils.checkpoints import load_tensors, load_weights
from utils.errors import UserError
from utils.settings import load_config

STAGES = {"train_vae": train_vae, "create_encodings": create_encodings, "train_diffusion": train_diffusion, "infer": infer}
SETTINGS = (
    "device=cpu", "precision=float32", "logging.tensorboard=false", "name=run", "data.num_images=200", "data.image_size=16",
    "vae.channels=[8,16]", "vae.attention=false", "vae.perceptual.net=none", "vae.max_minutes=null", "vae.steps=40",
    "vae.batch_size=8", "vae.eval_every=20", "vae.save_minutes=1e-9", "vae.lr_decay=none", "encodings.batch_size=64",
    "diffusion.channels=[16,32]", "diffusion.num_res_blocks=1", "diffusion.attn_resolutions=[4]",
    "diffusion.max_minutes=null", "diffusion.steps=40", "diffusion.batch_size=8", "diffusion.eval_every=20",
    "diffusion.save_minutes=1e-9", "diffusion.sample_images=4", "diffusion.lr_decay=none",
    "sampling.steps=4", "sampling.rows=2", "sampling.cols=2",
)  # fmt: skip
CHUNK, BLOCK_SIZE = 64, 16  # small, so that a run has several chunks and blocks
CHILD_TIMEOUT = 120  # seconds
FAULTS_PER_STAGE = 2

SURVIVED, DETECTED = "survived", "detected"


def main(minutes: float = 10.0, seed: int | None = None) -> int:
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    torch.set_num_threads(1)
    chunks.CHUNK, image_cache.BLOCK_SIZE = CHUNK, BLOCK_SIZE
    print(f"seed {seed}, {minutes:g} minutes, {machine()}", flush=True)
    violations = 0
    with tempfile.TemporaryDirectory() as name:
        reference = Path(name) / "reference"
        for stage in STAGES:
            result = Child(stage, reference).wait()
            assert result.code == 0, result.errors
        rows = []
        kinds = {  # name -> (function, share of the time)
            "damaged file": (DamagedFiles(reference, Path(name)), 0.3),
            "damaged partial image cache": (DamagedPartialCache(reference, Path(name)), 0.1),
            "killed process": (Interrupted(reference, Path(name), kill), 0.35),
            "full disk": (Interrupted(reference, Path(name), fill_disk), 0.1),
            "bad input": (bad_input, 0.15),
        }
        for kind, (inject, share) in kinds.items():
            deadline, counts, n = time.monotonic() + 60 * minutes * share, Counter(), 0
            while time.monotonic() < deadline:
                rng = random.Random(f"{seed} {kind} {n}")
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    outcomes = inject(rng, Path(folder))
                for outcome in outcomes:
                    counts[outcome if outcome in (SURVIVED, DETECTED) else "violation"] += 1
                    if outcome not in (SURVIVED, DETECTED):
                        print(f"violation: {kind}, case {n}: {outcome}", flush=True)
                n += 1
            numbers = [sum(counts.values()), counts[DETECTED], counts[SURVIVED], counts["violation"]]
            rows.append([kind, *(f"{number:,}" for number in numbers)])
            violations += counts["violation"]
    print_table(["fault", "injected", "detected", "survived", "violations"], rows)
    return int(violations > 0)


# Child processes


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [
        str(Path(__file__).parent.parent / "configs" / "demo.yaml"),
        *SETTINGS,
        f"runs_dir={folder}/runs",
        f"results_dir={folder}/results",
        *overrides,
    ]


class Child:
    """A stage in a forked process, which saves the seconds that imports take. `prepare` is called in the child."""

    def __init__(self, stage: str, folder: Path, *overrides: str, prepare: Callable[[], object] = lambda: None):
        folder.mkdir(parents=True, exist_ok=True)
        self.stage, self.started = stage, time.monotonic()
        self.pipe, log = os.pipe()
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 1 << 20)  # read after the process has ended
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.chdir(folder)  # bad settings may name relative paths
                os.dup2(log, 1)
                os.dup2(log, 2)
                # New objects: the old ones may refer to a file, and reconfigure() would seek in it.
                sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
                prepare()
                code = STAGES[stage].main(arguments(folder, *overrides))
            except KeyboardInterrupt:
                code = 130  # outside of the script
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(log)

    def wait(self, kill_after: float | None = None, kill_signal: int = signal.SIGKILL) -> "Child":
        """Wait for the end; send a signal after some seconds. Sets code: negative if a signal ended the process."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            seconds = time.monotonic() - self.started
            if seconds > CHILD_TIMEOUT:
                os.kill(self.pid, signal.SIGKILL)
            elif kill_after is not None and seconds > kill_after:
                os.kill(self.pid, kill_signal)
                kill_after = None
            time.sleep(0.002)
        self.code, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.started
        with open(self.pipe, errors="replace") as log:
            self.output = log.read()
        self.errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        return self

    def problem(self) -> str | None:
        """Return a violation: a hang, a traceback or more than one error line; None if the process ended properly."""
        if self.seconds > CHILD_TIMEOUT:
            return "hang"
        if "Traceback" in self.output:
            return self.output.strip().splitlines()[-1]
        if self.code == 2 and len(self.errors) == 1 or self.code in (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM):
            return None
        return f"exit code {self.code}, {len(self.errors)} error lines"


# Damaged files


def damaged(rng: random.Random, content: bytes) -> bytes | None:
    """Damage a file's content at random; None: a folder in its place."""
    n, damaged = len(content), bytearray(content)
    start, length = rng.randrange(n), rng.choice([1, 16, 512, 4096])
    kind = rng.choice(["bit", "bit", "bits", "zeros", "random", "cut", "cut", "longer", "moved", "whole", "folder"])
    if kind == "bit":
        damaged[start] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(length):
            damaged[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        damaged[start : start + length] = bytes(len(damaged[start : start + length]))
    elif kind == "random":
        damaged[start : start + length] = rng.randbytes(len(damaged[start : start + length]))
    elif kind == "cut":
        del damaged[start:]
    elif kind == "longer":
        damaged += rng.randbytes(length)
    elif kind == "moved":  # a block written to the wrong place
        source = rng.randrange(n)
        block = damaged[source : source + length]
        damaged[start : start + len(block)] = block
    elif kind == "whole":
        return rng.choice([b"", bytes(n), rng.randbytes(n), b"text\n" * 100])
    else:
        return None
    return bytes(damaged)


def put(path: Path, content: bytes | None) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


def same(a, b) -> bool:
    """Whether two loaded files are equal."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and same(vars(a), vars(b))
    return a == b


class DamagedFiles:
    """Damage a file, load it as the stages do, and compare."""

    def __init__(self, reference: Path, folder: Path):
        copy = folder / "damaged"
        shutil.copytree(reference, copy)
        self.config = load_config(arguments(copy)[0], arguments(copy)[1:])
        run = self.config.run_dir

        def load_state(path: Path) -> dict:
            return load_tensors(path, "remove it")

        def load_cache(_: Path) -> dict:
            return {k: v for k, v in vars(load_images(self.config)).items() if k != "verified"}

        self.loaders = {
            run / "vae" / "vae.safetensors": lambda path: load_weights(path, "vae", "train_vae.py"),
            run / "cosine" / "unet.safetensors": lambda path: load_weights(path, "unet", "train_diffusion.py"),
            run / "vae" / "state.pt": load_state,
            run / "cosine" / "state.pt": load_state,
            run / "encodings.pt": LatentDataset.load,
        }
        cache_dir = index_dataset(self.config).cache_dir
        self.loaders |= {path: load_cache for path in sorted(cache_dir.iterdir())}
        self.contents = {path: path.read_bytes() for path in self.loaders}
        self.loaded = {path: load(path) for path, load in self.loaders.items()}
        self.loaders = list(self.loaders.items()) + [(run / "encodings.pt", self.load_fingerprint)]

    def load_fingerprint(self, path: Path) -> str:
        return LatentDataset.load(path, verify=False).fingerprint  # as infer.py does

    def __call__(self, rng: random.Random, _: Path) -> list[str]:
        path, load = rng.choice(self.loaders)
        content = damaged(rng, self.contents[path])
        if content == self.contents[path]:
            return []
        put(path, content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                loaded = load(path)
            expected = self.loaded[path].fingerprint if load == self.load_fingerprint else self.loaded[path]
            if load == self.load_fingerprint and loaded != expected:
                return [DETECTED]  # infer.py refuses encodings with another fingerprint
            return [SURVIVED if same(loaded, expected) else f"{path.name} was accepted with other content"]
        except UserError as error:
            return [DETECTED if "\n" not in str(error) else f"{path.name}: more than one line"]
        except Exception as error:
            return [f"{path.name}: {type(error).__name__}: {error}"]
        finally:
            put(path, self.contents[path])


class DamagedPartialCache:
    """Damage an interrupted image cache, finish it, and compare all files."""

    def __init__(self, reference: Path, folder: Path):
        config = self.config(reference)
        self.expected = {path.name: path.read_bytes() for path in index_dataset(config).cache_dir.iterdir()}
        index = index_dataset(self.config(folder / "partial"))
        self.partial, read, calls = cache_format.partial_dir(index.cache_dir), index.source.read, []

        def interrupted_read(indices: list[int]) -> list:
            calls.append(indices)
            if len(calls) > 8:
                raise KeyboardInterrupt
            return read(indices)

        index.source.read = interrupted_read
        with contextlib.suppress(KeyboardInterrupt):
            index.load()

    def config(self, folder: Path):
        return load_config(arguments(folder)[0], arguments(folder)[1:])

    def __call__(self, rng: random.Random, folder: Path) -> list[str]:
        index = index_dataset(self.config(folder))
        partial = cache_format.partial_dir(index.cache_dir)
        shutil.copytree(self.partial, partial)
        path = rng.choice(sorted(partial.iterdir()))
        put(path, damaged(rng, path.read_bytes()))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                index.load().verified.result()
        except Exception as error:
            return [f"{path.name}: {type(error).__name__}: {error}"]
        files = {path.name: path.read_bytes() for path in index.cache_dir.iterdir()}
        return [SURVIVED if files == self.expected else f"{path.name}: another cache"]


# Killed processes and a full disk


def kill(rng: random.Random, seconds: float) -> tuple[Callable, dict]:
    """Kill a process at a random time, or at a random call of a function that changes files."""
    if rng.random() < 0.5:
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        return lambda: None, dict(kill_after=rng.uniform(0, seconds), kill_signal=number)
    name, n = rng.choice(["fsync", "replace", "unlink", "open", "ftruncate"]), rng.randrange(12)

    def prepare() -> None:
        function, calls = getattr(os, name), []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) > n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(os, name, dying)

    return prepare, {}


def fill_disk(rng: random.Random, _: float) -> tuple[Callable, dict]:
    """Some writes fail after half of the file; or no file can grow over a limit, as on a full disk."""
    if rng.random() < 0.3:
        limit = rng.choice([0, 5_000, 50_000, 150_000])

        def limit_size() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return limit_size, {}
    first, last = sorted((rng.randrange(10), rng.randrange(30)))

    def fail_writes() -> None:
        fsync, calls = os.fsync, []

        def full(descriptor: int) -> None:
            calls.append(1)
            if first < len(calls) <= last:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        os.fsync = full

    return fail_writes, {}


class Interrupted:
    """All four stages, each with faults; then without, until it is done. Compare the results with an undisturbed run."""

    def __init__(self, reference: Path, _: Path, fault: Callable):
        self.expected, self.fault = results(reference), fault

    def __call__(self, rng: random.Random, folder: Path) -> list[str]:
        outcomes = []
        for stage in STAGES:
            for _ in range(FAULTS_PER_STAGE):
                prepare, kill_options = self.fault(rng, 1.5)
                child = Child(stage, folder, prepare=prepare).wait(**kill_options)
                problem = child.problem()
                outcomes.append(f"{stage}: {problem}" if problem else DETECTED if child.code == 2 else SURVIVED)
            child = Child(stage, folder).wait()
            if child.code:
                return [*outcomes, f"{stage} cannot be resumed: {child.output.strip().splitlines()[-1]}"]
        leftovers = [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".lock"]
        if leftovers:
            outcomes.append(f"leftovers: {', '.join(leftovers)}")
        other = [name for name, value in results(folder).items() if not same(value, self.expected[name])]
        return outcomes + ([f"another {', '.join(other)}"] if other else [])


def results(folder: Path) -> dict:
    """Content of all outputs, except times."""
    run, (grid,) = folder / "runs" / "run", (folder / "results").glob("*.png")
    states = [torch.load(run / name / "state.pt", weights_only=True) for name in ("vae", "cosine")]
    (cache_dir,) = (path for path in (folder / "runs" / "cache").iterdir() if path.is_dir())
    return dict(
        cache={path.name: path.read_bytes() for path in sorted(cache_dir.iterdir())},
        vae=load_file(run / "vae" / "vae.safetensors"),
        unet=load_file(run / "cosine" / "unet.safetensors"),
        states=[{k: state[k] for k in ("step", "net", "ema", "optimizers")} for state in states],
        encodings=torch.load(run / "encodings.pt", weights_only=True),
        grid=np.asarray(Image.open(grid)),
    )


# Bad input


def image_bytes(rng: random.Random, size: int = 20) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(rng.randbytes(size * size * 3), np.uint8).reshape(size, size, 3)).save(file, "PNG")
    return file.getvalue()


def write_images(rng: random.Random, folder: Path) -> None:
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.png").write_bytes(image_bytes(rng))


def damage_image(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    put(path, damaged(rng, path.read_bytes()))


def damage_zip(rng: random.Random, folder: Path) -> None:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for image in sorted(folder.iterdir()):
            file.write(image, image.name)
    put(path, damaged(rng, path.read_bytes()))
    shutil.rmtree(folder)
    path.rename(folder)


def damage_captions(rng: random.Random, folder: Path) -> None:
    lines = "".join(f'{{"file_name": "{i:02d}.png", "text": "image {i}"}}\n' for i in range(20)).encode()
    put(folder / rng.choice(["captions.jsonl", "metadata.jsonl"]), damaged(rng, lines))


def remove_images(rng: random.Random, folder: Path) -> None:
    for path in rng.sample(sorted(folder.iterdir()), rng.randrange(10, 21)):
        path.unlink()


def bad_setting(rng: random.Random) -> str:
    key = rng.choice(["vae.lr", "vae.steps", "vae.channels", "data.image_size", "data.path", "name", "vae.batch_size",
                      "data.val_fraction", "vae.init_from", "runs_dir", "vae.perceptual.weights", "nothing.here"])  # fmt: skip
    value = rng.choice(
        ["-1", "0", "1e309", "nan", "null", "[]", "[7]", "true", "''", "text", "{a: 1}", "/dev/null", "10**9", "[", "é"]
    )
    return f"{key}={value}"


def bad_input(rng: random.Random, folder: Path) -> list[str]:
    """Damaged images, zips and captions, too few images, wrong settings: one error line, or training works."""
    images = folder / "images"
    write_images(rng, images)
    overrides = ["data.source=folder", f"data.path={images}", "vae.steps=1", f"vae.batch_size={rng.choice([1, 8])}"]
    kind = rng.choice([damage_image, damage_zip, damage_captions, remove_images, bad_setting])
    if kind is bad_setting:
        overrides.append(bad_setting(rng))
    else:
        kind(rng, images)
    child = Child("train_vae", folder, *overrides).wait()
    problem = child.problem()
    if problem:
        return [f"{kind.__name__} {overrides[-1]}: {problem}"]
    return [DETECTED if child.code == 2 else SURVIVED]


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        raise SystemExit(print(__doc__.strip()))
    raise SystemExit(main(*(float(a) if i == 0 else int(a) for i, a in enumerate(sys.argv[1:3]))))
