"""Identity of a training run, and the check that a run in a folder is the same one before it is resumed."""

import contextlib
import json
from pathlib import Path
from textwrap import shorten

from config import Config, TrainingConfig
from utils.checkpoints import load_tensors
from utils.errors import UserError
from utils.files import first_line

# Settings that may differ when a run is resumed. Any other change makes it a different run.
MAY_CHANGE_ON_RESUME = (
    "steps",
    "max_minutes",
    "micro_batch",
    "grad_checkpointing",
    "log_every",
    "eval_every",
    "save_minutes",
    "snapshot_every",
    "sample_images",
    "name",
    "retrain",
    "weights",  # path of the perceptual network
    "model",  # path of the text encoder; its fingerprint is compared instead
)


def run_identity(config: Config, section: str, **fingerprints: str) -> dict:
    """Settings of a stage, the seed, and properties and fingerprints of its training data."""
    data = {"image_size": config.data.size, "channels": config.data.channels, "flip": config.data.flip}
    return {section: getattr(config, section).model_dump(), "seed": config.seed, **data, **fingerprints}


def how_to_restart(path: Path) -> str:
    return f"remove {path} to start over"


@contextlib.contextmanager
def reject_foreign_checkpoint(path: Path):
    """Report any error as one line: in a foreign file keys, types and shapes may all be wrong."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of this network ({first_line(error)}): {how_to_restart(path)}"
        ) from None


def is_finished(cfg: TrainingConfig, step: int, minutes: float) -> bool:
    return step >= cfg.steps or (cfg.max_minutes is not None and minutes >= cfg.max_minutes)


def require_same_run(folder: Path, identity: dict, cfg: TrainingConfig, state: dict | None = None) -> bool:
    """Refuse a folder whose state.pt belongs to a run with another identity.

    Without `state` only the keys of `identity` are compared, so that settings can be checked before any work is done. Returns
    whether the run is finished.
    """
    path, settings_only = folder / "state.pt", state is None
    if settings_only and not path.exists():
        return False
    state = load_tensors(path, how_to_restart(path), mmap=True) if settings_only else state
    with reject_foreign_checkpoint(path):
        old, new = json.loads(state["identity"]), json.loads(json.dumps(identity))
        for section in old.keys() & {"vae", "diffusion"}:
            # Settings added after the checkpoint was written had their default value.
            old[section] = {**type(cfg)().model_dump(), **old[section]}
        changes = _differences({k: v for k, v in old.items() if k in new or not settings_only}, new)
        finished = is_finished(cfg, state["step"], state["minutes"])
    if changes:
        raise UserError(
            f"{folder} contains a run with other settings ({'; '.join(changes)}): choose another name, "
            f"restore the settings, or remove {folder}"
        )
    return finished


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted names whose values differ, except those in MAY_CHANGE_ON_RESUME."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += _differences(before, now, f"{prefix}{name}.")
        elif before != now and name not in MAY_CHANGE_ON_RESUME:
            changes.append(f"{prefix}{name} was {shorten(str(before), 60)}, now {shorten(str(now), 60)}")
    return changes
