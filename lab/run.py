"""A training run's folder: resumes, logs, saves, and knows when to stop."""

import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import Logging, Training
from lab import parallel
from lab.artifacts import NoSpace, load_plain, load_weights, save_plain, save_weights
from lab.errors import Diverged, Stopped, UserError
from lab.experiment import refusing_what_is_no_state, remedy, require_same_run
from lab.figures import Figures
from lab.logs import Writers
from lab.pictures import plot_curves, save_png
from training import EMA, hardware, is_out_of_memory, learning_rate


class Run:
    """Network, EMA and AdamW, and the folder they live in.

        with Run(folder, net, settings, …) as run:   # resumes from folder/state.pt
            while True:                              # report → evaluate → save → stop? → step
                if run.due(log_every): run.report()
                if run.due(eval_every): …
                if run.save_due(): run.save()
                if run.over: break
                run.seed_step()                  # then draw the whole batch's randomness, and keep run.share of it
                run.take_step(backward)          # backward(part of the share) ends in run.accumulate(loss, …)

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
        share = parallel.share_of(settings.batch_size)
        self.share = slice(share.start, share.stop)  # of the batch, this process's part
        self.micro_batch = len(share) if settings.micro_batch == "auto" else min(settings.micro_batch, len(share))
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
        self._figures = Figures(next(net.parameters()).device)
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
        """Gradients, clip, AdamW, EMA. `backward` is called with parts of this process's share of the batch: its micro-batches.

        With micro_batch "auto" a part that does not fit the GPU's memory is halved, and the step begun anew.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, self._minutes_decided)
        n = self.share.stop - self.share.start
        if not self.leads:  # the batch is drawn: from here on, dropout masks of this process's own
            torch.manual_seed((self.seed * 1_000_003 + self.step) * 1009 % 2**63 + parallel.rank())
        while True:
            try:
                for start in range(0, n, self.micro_batch):
                    backward(slice(start, min(start + self.micro_batch, n)))
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.settings.micro_batch != "auto" or self.micro_batch == 1:
                    raise UserError(f"{self.folder}: {self.micro_batch} images at a time do not fit the memory; "
                                    f"use a smaller micro_batch or smaller widths") from None  # fmt: skip
            # Outside of the handler, whose traceback holds on to the tensors of the failed pass.
            self.micro_batch = (self.micro_batch + 1) // 2
            self._figures.drop_parts()
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
        self._figures.watch(norm.detach(), self.step)
        self._figures.end_step(grad_norm=norm)
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
        self._figures.watch(watched.detach(), self.step, timesteps)

    def accumulate_companion(self, loss: Tensor, **figures: Tensor) -> None:
        """The same for the companion's own loss (B,)."""
        self._accumulate(loss, figures)

    def _accumulate(self, loss: Tensor, figures: dict[str, Tensor]) -> None:
        whole = self.settings.batch_size
        (loss.sum() / whole).backward()
        self._figures.add_part(figures, whole)

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.companion is not None:
            self.companion_optimizer.zero_grad(set_to_none=True)

    def _check_finite(self) -> None:
        step, timestep = self._figures.first_broken()
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
            self._started = time.monotonic()  # compiling is not training: max_minutes begins after it
        self.log({"seconds_to_first_step": round(seconds, 3)})

    def report(self) -> None:
        """Write the averages since the last report: progress bar, metrics.jsonl, TensorBoard. Raises Diverged."""
        self._check_finite()
        means = self._figures.means()
        if not means:
            return
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
                     fits=[*self._where(), self.micro_batch],
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
        with refusing_what_is_no_state(path):
            self.net.load_state_dict(state["net"])
            self.ema.net.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.companion is not None:
                self.companion.load_state_dict(state["companion"])
                self.companion_optimizer.load_state_dict(state["companion_optimizer"])
            self.step, self._minutes_before = int(state["step"]), float(state["minutes"])
            *where, fits = state.get("fits", [0])
        if self.settings.micro_batch == "auto" and where == self._where():
            self.micro_batch = min(self.micro_batch, fits)  # else the search, and what it compiles, would come again

    def _where(self) -> list:
        """On what a size of micro-batch was found to fit."""
        return [hardware(next(self.net.parameters()).device), parallel.size()]

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
