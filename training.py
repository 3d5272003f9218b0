"""What both training stages need beside the science: device and precision, seeds, EMA, learning rate, and `Run`, which
keeps a stage's folder: resumes, logs, saves, and knows when to stop."""

import copy
import importlib.util
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from artifacts import load_plain, save_plain, write_atomically
from cli import Diverged, Stopped
from config import Config, Logging, Training, UserError

# What may differ when a run is resumed; everything else would make it another experiment.
MAY_CHANGE = ("steps", "max_minutes", "log_every", "eval_every", "save_minutes", "sample_images", "name")


def pick_device(name: str) -> torch.device:
    """auto -> cuda, else mps, else cpu. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name} asked for, and torch finds {torch.cuda.device_count()} CUDA devices here; use device=auto or device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps asked for, and torch finds none here; use device=auto or device=cpu")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """auto -> bfloat16 where the hardware multiplies it (CUDA >= 8.0, CPUs with AMX or AVX512-BF16), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in dtype, the rest in float32; nothing at all for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def parameters_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def learning_rate(settings: Training, step: int) -> float:
    """Linear warm-up to lr, then lr or a cosine down to lr/10 at the last step."""
    rate = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.lr_decay == "cosine":
        progress = min(1.0, max(0, step - settings.warmup) / max(1, settings.steps - settings.warmup))
        rate *= 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
    return rate


def run_experiment(config: Config, section: str, **fingerprints: str) -> dict:
    """What a run is, for its state file: the stage's settings, the seed, and what it was trained on."""
    return {section: getattr(config, section).model_dump(), "seed": config.seed, "flip": config.data.flip, **fingerprints}


class EMA:
    """Exponential moving average of a network's parameters, in `.net`; the decay of update n is min(decay, (1+n)/(10+n))."""

    def __init__(self, net: nn.Module, decay: float):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay
        self._pairs = list(self.net.parameters()), list(net.parameters())

    @torch.no_grad()
    def update(self, n: int) -> None:
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self._pairs[0], self._pairs[1], 1 - decay)


class Run:
    """One training run: network, EMA, AdamW, and the folder they live in.

        run = Run(...)                       # resumes from folder/state.pt
        while True:                          # report → evaluate → save → stop? → step
            if run.due(log_every): run.report()
            …
            if run.over: break
            run.seed_step()
            run.step_with(loss, …)

    `experiment` says what the run is (settings, fingerprints): it must be the same on resume, except for MAY_CHANGE.
    """

    def __init__(self, folder: Path, net: nn.Module, settings: Training, experiment: dict, device: torch.device, seed: int, logging: Logging):
        self.folder, self.net, self.settings, self.experiment = folder, net, settings, experiment
        self.device, self.seed = device, seed
        self.ema = EMA(net, settings.ema)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.step = 0  # optimiser steps done
        self._minutes_before = 0.0
        self._evaluated_step = -1
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        # (step, timestep) of the first loss that was not finite, kept on the device: reading it every step would wait for it
        self._bad = torch.full((2,), -1, device=device)
        self._signal: int | None = None
        self._resume()
        self._first_step = self.step
        self._started = self._saved_at = self._reported_at = time.monotonic()
        self._reported_step = self.step
        self._writers = Writers(folder, experiment, logging, self.step) if not self.over else None
        self._bar: tqdm | None = None

    # Time and steps

    @property
    def minutes(self) -> float:
        """Minutes of training, all runs together."""
        return self._minutes_before + (time.monotonic() - self._started) / 60

    @property
    def images_seen(self) -> int:
        return self.step * self.settings.batch_size

    @property
    def over(self) -> bool:
        """All steps done, time used up, or told to stop."""
        if self._signal is not None or self.step >= self.settings.steps:
            return True
        return self.settings.max_minutes is not None and self.minutes >= self.settings.max_minutes

    def due(self, every: int) -> bool:
        """Is it time for something done every so many steps? Always after the last step, never before the first."""
        return self.step > self._first_step and self._signal is None and (self.step % every == 0 or self._ending)

    def seed_step(self) -> None:
        """Make the randomness of this step a function of (seed, step): nothing to save, and a resumed run draws the same."""
        torch.manual_seed((self.seed * 1_000_003 + self.step) % 2**63)

    def __enter__(self) -> "Run":
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._started = self._saved_at = self._reported_at = time.monotonic()
        self._bar = tqdm(total=self.settings.steps, initial=self.step, desc=self.folder.name, unit="step",
                         mininterval=0.5 if sys.stderr.isatty() else 20.0,
                         bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._bar.close()
        if self._writers:
            self._writers.close()

    def _on_signal(self, number: int, _frame) -> None:
        if self._signal is not None:  # asked twice: the user does not want to wait for the save
            raise KeyboardInterrupt
        self._signal = number
        tqdm.write(f"stopping after this step ({signal.Signals(number).name})")

    # One step

    def step_with(self, loss: Tensor, per_image: Tensor, timesteps: Tensor | None = None, **figures: Tensor) -> None:
        """Backward, clip, AdamW, EMA. `per_image` (B,) and `timesteps` (B,) serve to name what was not finite.

        `figures` (scalars on the device) are averaged until the next report.
        """
        rate = learning_rate(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        with torch.no_grad():
            broken = ~torch.isfinite(per_image.detach())
            where = timesteps[broken.long().argmax()] if timesteps is not None else torch.zeros_like(self._bad[1])
            now = torch.stack([torch.full_like(self._bad[0], self.step), where])
            first = (broken.any() | ~torch.isfinite(norm)) & (self._bad[0] < 0)
            self._bad = torch.where(first, now, self._bad)
            for name, value in {"loss": loss, "grad_norm": norm, **figures}.items():
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._summed += 1
        self.step += 1
        # Read the clock once per step, so that all decisions after this step agree.
        self._ending = self.over
        self._bar.update()

    _ending = False

    def _check_finite(self) -> None:
        step, timestep = self._bad.tolist()
        if step >= 0:
            at = f" at timestep {timestep}" if "diffusion" in self.experiment else ""
            kept = f"the last good state, in {self.folder}, is kept" if (self.folder / "state.pt").exists() else "no state had been saved yet"
            raise Diverged(f"{self.folder.name}: the loss or its gradient is not finite in step {step}{at}, learning rate "
                           f"{learning_rate(self.settings, step):.3g}; {kept}. Try a smaller lr or precision=float32")

    # Logging

    def report(self) -> None:
        """Write the averages since the last report: progress bar, metrics.jsonl, TensorBoard. Raises Diverged."""
        self._check_finite()
        if not self._summed:
            return
        means = {name: float(total) / self._summed for name, total in self._sums.items()}
        self._sums, self._summed = {}, 0
        now = time.monotonic()
        rate = (self.step - self._reported_step) * self.settings.batch_size / max(now - self._reported_at, 1e-9)
        self._reported_at, self._reported_step = now, self.step
        self.log({f"train/{name}": value for name, value in means.items()}
                 | {"lr": learning_rate(self.settings, self.step - 1), "images_per_second": rate})
        per_step = self.settings.batch_size / rate
        left = (self.settings.steps - self.step) * per_step / 60
        if self.settings.max_minutes is not None:
            left = min(left, max(0.0, self.settings.max_minutes - self.minutes))
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.0f} img/s, {_clock(left)} left", refresh=False)

    def log(self, figures: dict[str, float]) -> None:
        self._writers.figures(self.step, {"images_seen": self.images_seen, "minutes": round(self.minutes, 3), **figures})

    def picture(self, name: str, image) -> None:
        """Show a PIL image in TensorBoard (and wandb) at this step."""
        self._writers.picture(self.step, name, image)

    # Saving

    def save_due(self) -> bool:
        if self.step == self._first_step and self._first_step > 0:
            return False
        return self.over or time.monotonic() - self._saved_at > 60 * self.settings.save_minutes

    def save(self, save_for_use) -> None:
        """Write state.pt, then let save_for_use(ema_net) write the weights file. Raises Diverged rather than save a broken state.

        A full disk does not end a run that still has work to do: the files of the last save stay, and it tries again.
        """
        self._check_finite()
        minutes = self.minutes
        state = dict(kind="state", experiment=json.dumps(self.experiment), step=self.step, minutes=minutes,
                     net=self.net.state_dict(), ema=self.ema.net.state_dict(), optimizer=self.optimizer.state_dict())
        try:
            save_plain(self.folder / "state.pt", state)
            save_for_use(self.ema.net)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            if self.over:
                raise OSError(28, "no space left on device", str(self.folder)) from error if not isinstance(error, OSError) else error
            tqdm.write(f"could not save at step {self.step} ({error}); the last save is kept, training goes on")
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        remedy = f"remove {path} to start anew"
        state = load_plain(path, remedy)
        if state.get("kind") != "state" or not isinstance(state.get("experiment"), str):
            raise UserError(f"{path} is not a training state: {remedy}")
        differing = _differences(json.loads(state["experiment"]), json.loads(json.dumps(self.experiment)))
        if differing:
            raise UserError(f"{self.folder} holds a run with other settings ({'; '.join(differing)}): give this one another name, "
                            f"set them back, or remove {self.folder}")
        try:
            self.net.load_state_dict(state["net"])
            self.ema.net.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self._minutes_before = int(state["step"]), float(state["minutes"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{path} does not fit this network ({str(error).splitlines()[0]}): {remedy}") from None
        self._started = time.monotonic()

    @property
    def complete(self) -> bool:
        """Ended by its last step or its time budget, not by a signal or half-way."""
        return self.over and self._signal is None

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        tqdm.write(f"step {self.step:,}: {text}")

    def stop_if_told(self) -> None:
        """After the loop: raise Stopped if a signal ended it."""
        if self._signal is not None:
            raise Stopped(f"stopped at step {self.step} of {self.settings.steps}, state saved in {self.folder}; "
                          f"the same command goes on from here", self._signal)


def _clock(minutes: float) -> str:
    return f"{int(minutes)}:{int(minutes * 60) % 60:02d}"


def _differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Dotted names whose values differ, MAY_CHANGE left out."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new and name not in MAY_CHANGE:
            found.append(f"{prefix}{name} was {old}, now {new}")
    return found


class Writers:
    """metrics.jsonl always; TensorBoard and Weights & Biases where asked for and installed."""

    def __init__(self, folder: Path, experiment: dict, logging: Logging, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._drop_after(step)
        self.file = open(self.path, "a", encoding="utf-8")
        self.board = self.wandb = None
        if logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tb"), purge_step=step + 1 if step else None)
        if logging.wandb:
            if importlib.util.find_spec("wandb") is None:
                tqdm.write("logging.wandb is on and the package wandb is not installed: pip install wandb; going on without")
            else:
                import wandb

                self.wandb = wandb.init(project="nanoldm", name=str(folder), config=experiment, resume="allow")

    def _drop_after(self, step: int) -> None:
        """A run that was killed may have logged steps past its last save; they will be done and logged again."""
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            if len(kept) < len(lines):
                write_atomically(self.path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))

    def figures(self, step: int, figures: dict) -> None:
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(figures, step=step)

    def picture(self, step: int, name: str, image) -> None:
        import numpy as np

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
