"""Where figures and pictures of a run go: metrics.jsonl always; TensorBoard and Weights & Biases where asked for and installed."""

import importlib.util
import json
import secrets
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import Logging
from lab.artifacts import make_folder, noticing_a_full_disk, write_atomically


class Writers:
    """The writers of one run, which goes on from `step`. `experiment` is logged as the run's configuration."""

    def __init__(self, folder: Path, experiment: dict, logging: Logging, step: int):
        make_folder(folder)
        self.path = folder / "metrics.jsonl"
        self._drop_after(step)
        self.file = open(self.path, "a", encoding="utf-8")
        self.board = self.wandb = None
        if logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tb"), purge_step=step + 1)
        if logging.wandb:
            if importlib.util.find_spec("wandb") is None:
                tqdm.write("logging.wandb is on and the package wandb is not installed: pip install wandb; going on without")
            else:
                import wandb

                known = folder / "wandb_id"  # a resumed run goes on where it was shown, one begun anew is another
                if not step or not known.exists():
                    known.write_text(secrets.token_hex(8))
                self.wandb = wandb.init(project="nanoldm", id=known.read_text(), name=str(folder), config=experiment, resume="allow")  # fmt: skip

    def _drop_after(self, step: int) -> None:
        """A run that was killed may have logged steps past its last save; they will be done and logged again."""
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            if len(kept) < len(lines):
                write_atomically(self.path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))

    def figures(self, step: int, figures: dict) -> None:
        """Scalars by name. Raises NoSpace where the disk is full."""
        with noticing_a_full_disk(self.path):
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(figures, step=step)

    def picture(self, step: int, name: str, image) -> None:
        """A PIL image for TensorBoard and Weights & Biases."""
        if self.board:
            self.board.add_image(name, np.asarray(image), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None  # half a line, cut off when the process was killed
