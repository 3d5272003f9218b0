"""A training run's folder: resumes, logs, saves, and knows when to stop."""

import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from textwrap import shorten
from typing import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, Logging, Training
from lab import parallel
from lab.artifacts import NoSpace, first_line, load_plain, load_weights, save_plain, save_weights
from lab.errors import Diverged, Stopped, UserError
from lab.logs import Writers
from lab.pictures import plot_curves, save_png
from training import EMA, is_out_of_memory, learning_rate

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


class Run:
    """Network, EMA and AdamW, and the folder they live in.

        with Run(folder, net, settings, …) as run:   # resumes from folder/state.pt
            while True:                              # report → evaluate → save → stop? → step
                if run.due(log_every): run.report()
                if run.due(eval_every): …
                if run.save_due(): run.save()
                if run.over: break
                run.seed_step()                  # then draw the whole batch's randomness
                run.take_step(backward)          # backward(part) ends in run.accumulate(loss, …)

    Whether it is `over` is decided once per step, so that all decisions after a step agree. `weights` names the file for use: the
    EMA network, `extra` tensors, and `header` with how far the run has come. A `companion` network (a discriminator) learns beside
    it, at its own constant learning rate, and is kept in the state alone.
    """

    def __init__(self, folder: Path, net: nn.Module, settings: Training, experiment: dict, seed: int, logging: Logging,
                 weights: str, header: dict, extra: dict[str, Tensor] | None = None,
                 companion: nn.Module | None = None, companion_lr: float = 0.0):  # fmt: skip
        self.folder, self.net, self.settings, self.experiment, self.seed = folder, net, settings, experiment, seed
        self.weights, self.header, self.extra = folder / weights, header, extra or {}
        self.leads = parallel.leads()
        if settings.batch_size < parallel.size():
            raise UserError(
                f"batch_size {settings.batch_size} is less than the {parallel.size()} processes that are to share it"
            )
        self.micro_batch = settings.batch_size if settings.micro_batch == "auto" else settings.micro_batch
        self.ema = EMA(net, settings.ema)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.companion = companion  # a network that learns beside it and is of no use later: a discriminator
        if companion is not None:
            self.companion_optimizer = torch.optim.AdamW(companion.parameters(), companion_lr, (0.5, 0.9), weight_decay=0.0)
        self.step = 0  # optimiser steps done
        self._minutes_before = 0.0
        self._resume()
        self._first_step = self.step
        self._started = self._saved_at = time.monotonic()
        self._restart_stopwatch()
        self._sums: dict[str, Tensor] = {}  # of figures since the last report, on the device
        self._parts: list[dict[str, Tensor]] = []  # figures of this step's micro-batches
        self._counts: dict[str, int] = {}  # of steps that had each figure
        # (step, timestep) of the first loss that was not finite, on the device: reading it every step would wait for it.
        self._bad = torch.full((2,), -1, device=next(net.parameters()).device)
        self._signal: int | None = None
        self._decide()
        if self.over and self.leads:
            self._save_if_stale()
        self._writers = Writers(folder, experiment, logging, self.step) if self.leads and not self.over else None

    # Time and steps

    @property
    def minutes(self) -> float:
        """Minutes of training, all runs together."""
        return self._minutes_before + (time.monotonic() - self._started) / 60

    @property
    def images_seen(self) -> int:
        return self.step * self.settings.batch_size

    def _decide(self) -> None:
        """Rank 0 decides, by its own clock and signals."""
        self._minutes_decided, stopped_by = parallel.tell_numbers([self.minutes, self._signal or 0])
        budget, self.stopped_by = self.settings.max_minutes, int(stopped_by) or None
        self.complete = self.step >= self.settings.steps or (budget is not None and self._minutes_decided >= budget)
        self.over = self.complete or self.stopped_by is not None

    def due(self, every: int) -> bool:
        """Is it time for something done every so many steps? Always when complete, never before the first step."""
        return self.step > self._first_step and (self.complete or (self.step % every == 0 and not self.over))

    def seed_step(self) -> None:
        """Make the randomness of this step a function of (seed, step): nothing to save, and a resumed run draws the same."""
        torch.manual_seed((self.seed * 1_000_003 + self.step) % 2**63)

    def __enter__(self) -> "Run":
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._started = self._saved_at = time.monotonic()
        self._restart_stopwatch()
        self._bar = tqdm(
            total=self.settings.steps, initial=self.step, desc=self.folder.name, disable=self.over,
            mininterval=0.5 if sys.stderr.isatty() else 20.0, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._bar.close()
        if self._writers:
            self._writers.close()
            if self.step > self._first_step:
                with _surviving_a_full_disk("the curves"):
                    plot_curves(self.folder)

    def _on_signal(self, number: int, _frame) -> None:
        if self._signal is not None:  # asked twice: the user does not want to wait for the save
            raise KeyboardInterrupt
        self._signal = number
        tqdm.write(f"stopping after this step ({signal.Signals(number).name})")

    # One step

    def take_step(self, backward: Callable[[slice], None]) -> None:
        """Gradients, clip, AdamW, EMA. `backward` is called with parts of the batch: this process's share of it, in micro-batches.

        With micro_batch "auto" a part that does not fit the GPU's memory is halved, and the step begun anew.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, self._minutes_decided)
        share = parallel.share_of(self.settings.batch_size)
        if not self.leads:  # the batch is drawn: from here on, dropout masks of this process's own
            torch.manual_seed((self.seed * 1_000_003 + self.step) * 1009 % 2**63 + parallel.rank())
        while True:
            try:
                for start in range(share.start, share.stop, self.micro_batch):
                    backward(slice(start, min(start + self.micro_batch, share.stop)))
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.settings.micro_batch != "auto" or self.micro_batch == 1:
                    raise UserError(f"{self.folder}: {self.micro_batch} images at a time do not fit the memory; "
                                    f"use a smaller micro_batch or smaller widths") from None  # fmt: skip
            # Outside of the handler, whose traceback holds on to the tensors of the failed pass.
            self.micro_batch = (min(self.micro_batch, len(share)) + 1) // 2
            self._parts = []
            self._forget_gradients()
            torch.cuda.empty_cache()
            self.say(f"the batch does not fit the GPU's memory; in micro-batches of {self.micro_batch} from here")
        parallel.sum_gradients(self.net)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        if self.companion is not None and any(p.grad is not None for p in self.companion.parameters()):
            parallel.sum_gradients(self.companion)
            nn.utils.clip_grad_norm_(self.companion.parameters(), self.settings.grad_clip)
            self.companion_optimizer.step()
        self._forget_gradients()
        self.ema.update(self.step)
        self._watch(norm)
        for figures in [{"grad_norm": norm.detach().float()}, *self._parts]:
            for name, value in figures.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        for name in {"grad_norm", *(name for figures in self._parts for name in figures)}:
            self._counts[name] = self._counts.get(name, 0) + 1
        self._parts = []
        self.step += 1
        if self.step == self._first_step + 1:
            self._report_first_step(norm)
        self._decide()
        self._bar.update()

    def accumulate(self, loss: Tensor, watched: Tensor, timesteps: Tensor | None = None, **figures: Tensor) -> None:
        """Backward of the mean of `loss` (B,), this part's share of the whole batch's mean.

        `watched` (B,) and `timesteps` (B,) serve to name what was not finite; `figures` (B,) are averaged until the next report.
        """
        self._accumulate(loss, {"loss": loss, **figures})
        self._watch(watched.detach(), timesteps)

    def accumulate_companion(self, loss: Tensor, **figures: Tensor) -> None:
        """The same for the companion's own loss (B,)."""
        self._accumulate(loss, figures)

    def _accumulate(self, loss: Tensor, figures: dict[str, Tensor]) -> None:
        whole = self.settings.batch_size
        (loss.sum() / whole).backward()
        self._parts.append({name: value.detach().float().sum() / whole for name, value in figures.items()})

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.companion is not None:
            self.companion_optimizer.zero_grad(set_to_none=True)

    def _watch(self, values: Tensor, timesteps: Tensor | None = None) -> None:
        """Remember the first step with a value that is not finite."""
        broken = ~torch.isfinite(values)
        timestep = torch.full_like(self._bad[0], -1)
        if timesteps is not None:
            timestep = torch.where(broken.any(), timesteps.gather(0, broken.long().argmax()[None])[0], timestep)
        first = broken.any() & (self._bad[0] < 0)
        self._bad = torch.where(first, torch.stack([torch.full_like(timestep, self.step), timestep]), self._bad)

    def _check_finite(self) -> None:
        step, timestep = self._bad.tolist()
        if step < 0:
            return
        what = f"the loss at timestep {timestep} is" if timestep >= 0 else "the loss or its gradient is"
        kept = "the last good state is kept" if (self.folder / "state.pt").exists() else "no state had been saved yet"
        raise Diverged(f"{self.folder}: {what} not finite in step {step}, learning rate {self.optimizer.param_groups[0]['lr']:.3g}; "
                       f"{kept}. Try a smaller lr, or precision=float32")  # fmt: skip

    # Logging

    def _report_first_step(self, norm: Tensor) -> None:
        """It compiles, chooses kernels and touches all memory for the first time: apart from the rate, and outside of it."""
        float(norm)  # waits for the device
        seconds = time.monotonic() - self._started
        if seconds > 5:
            self.say(f"the first step took {seconds:.0f} s")
        self.log({"seconds_to_first_step": round(seconds, 3)})

    def report(self) -> None:
        """Write the averages since the last report: progress bar, metrics.jsonl, TensorBoard. Raises Diverged."""
        self._check_finite()
        if not self._sums:
            return
        names = sorted(self._sums.keys() - {"grad_norm"})  # that one is the whole batch's in every process
        totals = parallel.total(torch.stack([self._sums[name] for name in names])).tolist()
        means = {
            name: value / self._counts[name]
            for name, value in zip([*names, "grad_norm"], [*totals, float(self._sums["grad_norm"])])
        }
        self._sums, self._counts = {}, {}
        figures = {f"train/{name}": value for name, value in means.items()} | {"lr": self.optimizer.param_groups[0]["lr"]}
        if self.step == self._stopwatch_step:  # the first step alone, which says nothing of the rate
            self.log(figures)
            return
        seconds = time.monotonic() - self._stopwatch
        rate = (self.step - self._stopwatch_step) * self.settings.batch_size / max(seconds, 1e-9)  # images per second
        self.log(figures | {"images_per_second": rate})
        left = (self.settings.steps - self.step) * self.settings.batch_size / max(rate, 1e-9) / 60
        if self.settings.max_minutes is not None:
            left = min(left, max(0.0, self.settings.max_minutes - self.minutes))
        clock = f"{int(left)}:{int(left * 60) % 60:02d}"
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.0f} img/s, {clock} left", refresh=False)

    def log(self, figures: dict[str, float]) -> None:
        """Write figures of this step to metrics.jsonl, TensorBoard, wandb."""
        if not self.leads:
            return
        with _surviving_a_full_disk("the figures"):
            self._writers.figures(self.step, {"images_seen": self.images_seen, "minutes": round(self.minutes, 3), **figures})
        self._restart_stopwatch()

    def picture(self, name: str, image, file: str) -> None:
        """Write a PIL image to the run's folder and show it in TensorBoard and wandb."""
        with _surviving_a_full_disk(file):
            save_png(image, self.folder / file)
            self._writers.picture(self.step, name, image)
        self._restart_stopwatch()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        tqdm.write(f"step {self.step:,}: {text}")

    def _restart_stopwatch(self) -> None:
        """Leave what is not training out of the images per second."""
        self._stopwatch, self._stopwatch_step = time.monotonic(), self.step

    # Saving

    def save_due(self) -> bool:
        if self.step == self._first_step or not self.leads:
            return False
        return self.over or time.monotonic() - self._saved_at > 60 * self.settings.save_minutes

    def save(self) -> None:
        """Write the weights file, then state.pt. Raises Diverged rather than save a broken state.

        A full disk does not end a run that still has work to do: the files of the last save stay, and it tries again.
        """
        self._check_finite()
        state = dict(kind="state", experiment=json.dumps(self.experiment), step=self.step, minutes=self.minutes,
                     net=self.net.state_dict(), ema=self.ema.net.state_dict(), optimizer=self.optimizer.state_dict())  # fmt: skip
        if self.companion is not None:
            state |= dict(companion=self.companion.state_dict(), companion_optimizer=self.companion_optimizer.state_dict())
        with contextlib.nullcontext() if self.over else _surviving_a_full_disk(f"the state of step {self.step}"):
            # In this order: if it is cut off between the two, the run resumes from the older state and makes these weights again.
            self._save_weights(self.weights)
            save_plain(self.folder / "state.pt", state)
        self._saved_at = time.monotonic()
        self._restart_stopwatch()

    def snapshot(self) -> None:
        """Keep the weights of this step in snapshots/. Raises Diverged rather than keep broken ones."""
        self._check_finite()
        with _surviving_a_full_disk("a snapshot"):
            self._save_weights(self.folder / "snapshots" / f"step_{self.step:07d}.safetensors")
        self._restart_stopwatch()

    def _save_weights(self, path: Path) -> None:
        progress = {"step": self.step, "steps": self.settings.steps, "minutes": self.minutes, "complete": self.complete}
        save_weights(path, {**self.ema.net.state_dict(), **self.extra}, {**self.header, **progress})

    def _save_if_stale(self) -> None:
        """A finished run whose weights file is missing, damaged or older than its state: write it again."""
        try:
            _, header = load_weights(self.weights, self.header["kind"], "")
        except UserError:
            header = {}
        if header.get("step") != self.step or not header.get("complete"):
            self.save()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = load_plain(path, remedy(path))
        require_same_run(self.folder, self.experiment, self.settings, state)
        with _refusing_what_is_no_state(path):
            self.net.load_state_dict(state["net"])
            self.ema.net.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.companion is not None:
                self.companion.load_state_dict(state["companion"])
                self.companion_optimizer.load_state_dict(state["companion_optimizer"])
            self.step, self._minutes_before = int(state["step"]), float(state["minutes"])

    def stop_if_told(self) -> None:
        """After the loop: raise Stopped if a signal ended it before it was complete."""
        if self.stopped_by is not None and not self.complete:
            parallel.wait()  # for rank 0 to have saved: the end of any other would end it
            raise Stopped(f"stopped at step {self.step} of {self.settings.steps}, state saved in {self.folder}; "
                          f"the same command goes on from here", self.stopped_by)  # fmt: skip


@contextlib.contextmanager
def _surviving_a_full_disk(what: str):
    try:
        yield
    except NoSpace:
        tqdm.write(f"no space left on the disk for {what}; what was saved before is kept, training goes on")


def remedy(path: Path) -> str:
    return f"remove {path} to start anew"


@contextlib.contextmanager
def _refusing_what_is_no_state(path: Path):
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
    with _refusing_what_is_no_state(path):
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
