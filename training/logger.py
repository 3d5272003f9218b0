"""Training logs: metrics.jsonl, TensorBoard, an experiment tracker, and the plot curves.png."""

import contextlib
import importlib
import json
import secrets
from pathlib import Path
from types import ModuleType
from typing import Iterator

import numpy as np
from tqdm import tqdm

from config import LoggingConfig
from utils.errors import UserError
from utils.files import first_line, make_dir, raise_no_space, write_atomically
from utils.images import over_white

NOT_PLOTTED = ("step", "images_seen", "minutes", "seconds_to_first_step")


def import_tracker(cfg: LoggingConfig) -> ModuleType | None:
    """Import the package named by logging.tracker; wandb and trackio have the same API. Return None if it is "none"."""
    if cfg.tracker == "none":
        return None
    try:
        return importlib.import_module(cfg.tracker)
    except ImportError as error:
        raise UserError(
            f"logging.tracker={cfg.tracker}: the package cannot be imported ({first_line(error)}): "
            f"pip install {cfg.tracker}, or set logging.tracker=none"
        ) from None


class Logger:
    """Write the metrics and images of a run that starts or resumes at `step`.

    identity: the run's settings and fingerprints, which the tracker shows as the run's config
    """

    def __init__(self, folder: Path, identity: dict, cfg: LoggingConfig, step: int):
        make_dir(folder)
        self.path = folder / "metrics.jsonl"
        try:
            self._drop_lines_after(step)
            self.file = open(self.path, "a", encoding="utf-8")
        except (IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): make it writable or remove it") from None
        self.tensorboard, self.tracker = None, import_tracker(cfg)
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=step + 1)
        if self.tracker:
            id_file = folder / "tracker_id"  # a resumed run keeps its id in the tracker; a new run gets a new one
            if not step or not id_file.exists():
                id_file.write_text(secrets.token_hex(4))
            run_id = id_file.read_text()
            # wandb finds the run to resume by its id, and trackio by its name.
            identifier = {"id": run_id} if cfg.tracker == "wandb" else {}
            name = f"{folder.parent.name}-{folder.name}-{run_id}"
            self.tracker.init(project="nanoldm", name=name, config=identity, resume="allow", **identifier)

    def _drop_lines_after(self, step: int) -> None:
        """Remove lines that a killed run logged after its last save: those steps will be repeated."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            if len(kept) < len(lines):
                write_atomically(self.path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))

    def log_metrics(self, step: int, metrics: dict) -> None:
        """Log scalars by name. Raises NoSpaceError if the disk is full."""
        with raise_no_space(self.path):
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        with self._turn_off_tensorboard_if_disk_full():
            for name, value in metrics.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(metrics, step=step)

    def log_image(self, step: int, name: str, image) -> None:
        """Log a PIL image to TensorBoard and the tracker. Transparency is composited over white."""
        image = over_white(image)
        with self._turn_off_tensorboard_if_disk_full():
            if self.tensorboard:
                self.tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self.tracker:
            self.tracker.log({name: self.tracker.Image(image)}, step=step)

    @contextlib.contextmanager
    def _turn_off_tensorboard_if_disk_full(self) -> Iterator[None]:
        """TensorBoard's writer keeps the first error of its thread and raises it in every later call."""
        try:
            yield
        except OSError as error:
            tqdm.write(f"warning: TensorBoard cannot write ({first_line(error)}) and is turned off; training continues")
            self.tensorboard = None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, of which log_metrics() has warned
            self.file.close()
        with self._turn_off_tensorboard_if_disk_full():
            if self.tensorboard:
                self.tensorboard.close()
        if self.tracker:
            self.tracker.finish()


def _step_of(line: str) -> int | None:
    """Return the step of a line of metrics.jsonl, or None if the line is damaged, for example cut by a killed process."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def plot_curves(folder: Path) -> Path | None:
    """Plot folder/metrics.jsonl to folder/curves.png, one panel per metric. Return its path; None if nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    series: dict[str, dict[str, list]] = {}  # panel -> "train" | "val" | "" -> [(step, value), …]
    for line in (json.loads(line) for line in lines if _step_of(line) is not None):
        for name, value in line.items():
            if name not in NOT_PLOTTED and isinstance(value, (int, float)):
                split, _, panel = name.rpartition("/")
                series.setdefault(panel, {}).setdefault(split, []).append((line["step"], value))
    if not series:
        return None
    cols = 3
    rows = -(-len(series) // cols)
    figure, axes = plt.subplots(rows, cols, figsize=(5 * cols, 3 * rows), squeeze=False)
    # In inches. tight_layout() would lay out all texts twice, which takes seconds on a slow CPU.
    figure.subplots_adjust(
        left=0.8 / (5 * cols), right=1 - 0.15 / (5 * cols), bottom=0.5 / (3 * rows), top=1 - 0.3 / (3 * rows),
        wspace=0.25, hspace=0.45,
    )  # fmt: skip
    for axis, (panel, curves) in zip(axes.flat, series.items()):
        for split, points in curves.items():
            axis.plot(*zip(*points), label=split or None, marker="." if len(points) < 30 else None)
        if panel in ("loss", "unweighted_loss", "reconstruction"):
            axis.set_yscale("log")
        axis.set_title(panel)
        axis.set_xlabel("step")
        if any(curves):
            axis.legend()
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    path = folder / "curves.png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))
    plt.close(figure)
    return path
