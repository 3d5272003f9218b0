"""What a training run is, and whether the run in a folder is the same one."""

import contextlib
import json
from pathlib import Path
from textwrap import shorten

from config import Config, Training
from lab.artifacts import first_line, load_plain
from lab.errors import UserError

# What may differ when a run is resumed; everything else would make it another experiment.
MAY_CHANGE = (
    "steps",
    "max_minutes",
    "micro_batch",
    "checkpointing",
    "log_every",
    "eval_every",
    "save_minutes",
    "snapshot_every",
    "sample_images",
    "name",
    "weights",  # of the perceptual network: where the file lies
    "model",  # of text: where it lies; its fingerprint tells it apart
)


def experiment_of(config: Config, section: str, **fingerprints: str) -> dict:
    """What a run is: the stage's settings, the seed, and what it was trained on. The same on resume, except for MAY_CHANGE."""
    return {section: getattr(config, section).model_dump(), "seed": config.seed, "flip": config.data.flip, **fingerprints}


def remedy(path: Path) -> str:
    return f"remove {path} to start anew"


@contextlib.contextmanager
def refusing_what_is_no_state(path: Path):
    try:
        yield
    except Exception as error:  # a dictionary that is no state: keys, types and shapes may all be wrong
        raise UserError(f"{path} is not a state of this network ({first_line(error)}): {remedy(path)}") from None


def require_same_run(folder: Path, experiment: dict, settings: Training, state: dict | None = None) -> None:
    """Raise UserError where the folder holds a run that differs in what `experiment` says: before any work its settings, and on
    resume, with the state that was read, all that it is."""
    path, early = folder / "state.pt", state is None
    if early and not path.exists():
        return
    state = load_plain(path, remedy(path), mmap=True) if early else state
    with refusing_what_is_no_state(path):
        before, now = json.loads(state["experiment"]), json.loads(json.dumps(experiment))
        for section in before.keys() & {"vae", "diffusion"}:
            # A setting that is newer than the state had its default then.
            before[section] = {**type(settings)().model_dump(), **before[section]}
        differing = _differences({k: v for k, v in before.items() if k in now or not early}, now)
    if differing:
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(differing)}): give this one another name, "
                        f"set them back, or remove {folder}")  # fmt: skip


def _differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Dotted names whose values differ, MAY_CHANGE left out."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new and name not in MAY_CHANGE:
            found.append(f"{prefix}{name} was {shorten(str(old), 60)}, now {shorten(str(new), 60)}")
    return found
