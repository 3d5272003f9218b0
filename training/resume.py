"""Identity of a training run: a run is resumed only if its settings and data are those with which it was started."""

import contextlib
import json
from pathlib import Path
from textwrap import shorten

from config import Config, TrainingConfig
from utils.checkpoints import load_tensors
from utils.errors import UserError
from utils.files import first_line

# Settings that may change when a run is resumed. If any other setting changes, resuming fails.
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
    "weights",  # path of the perceptual network's weights
    "model",  # path of the text encoder, whose weights are compared by fingerprint
)


def run_identity(config: Config, section: str, **fingerprints: str) -> dict:
    """Identity of a run: settings of its config section, seed, image format, and fingerprints of its training data."""
    data = {"image_size": config.data.size, "channels": config.data.channels, "flip": config.data.flip}
    return {section: getattr(config, section).model_dump(), "seed": config.seed, **data, **fingerprints}


def how_to_restart(path: Path) -> str:
    return f"remove {path} to start over"


@contextlib.contextmanager
def reject_foreign_checkpoint(path: Path):
    """Convert any error to a one-line UserError. A file from elsewhere can have wrong keys, types or shapes."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of this network ({first_line(error)}): {how_to_restart(path)}"
        ) from None


def is_finished(cfg: TrainingConfig, step: int, minutes: float) -> bool:
    return step >= cfg.steps or (cfg.max_minutes is not None and minutes >= cfg.max_minutes)


def require_same_run(folder: Path, identity: dict, cfg: TrainingConfig, state: dict | None = None) -> bool:
    """Raise an error if state.pt in `folder` belongs to a run with another identity. Return whether that run is finished.

    state  content of state.pt; None: read its identity, and compare only the entries that `identity` has. This checks the
           settings early, before the fingerprints of the data are known.
    """
    path, settings_only = folder / "state.pt", state is None
    if settings_only and not path.exists():
        return False
    state = load_tensors(path, how_to_restart(path), mmap=True) if settings_only else state
    with reject_foreign_checkpoint(path):
        old, new = json.loads(state["identity"]), json.loads(json.dumps(identity))
        for section in old.keys() & {"vae", "diffusion"}:
            # A setting that did not exist when the checkpoint was written counts as its default.
            old[section] = _with_defaults(old[section], type(cfg)().model_dump())
        changes = _differences({k: v for k, v in old.items() if k in new or not settings_only}, new)
        finished = is_finished(cfg, state["step"], state["minutes"])
    if changes:
        raise UserError(
            f"{folder} contains a run with other settings ({'; '.join(changes)}): choose another name, "
            f"restore the settings, or remove {folder}"
        )
    return finished


def _with_defaults(settings: dict, defaults: dict) -> dict:
    """Add the default of every setting that is missing, also in nested sections."""
    sections = [name for name, value in settings.items() if isinstance(value, dict) and isinstance(defaults.get(name), dict)]
    return {**defaults, **settings, **{name: _with_defaults(settings[name], defaults[name]) for name in sections}}


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Describe the values that differ ("vae.lr was 0.1, now 0.2"), except those in MAY_CHANGE_ON_RESUME."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += _differences(before, now, f"{prefix}{name}.")
        elif before != now and name not in MAY_CHANGE_ON_RESUME:
            changes.append(f"{prefix}{name} was {shorten(str(before), 60)}, now {shorten(str(now), 60)}")
    return changes
