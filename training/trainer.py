"""Trainer: optimizer steps, logging, saving, resuming and stopping, for both training scripts."""

import contextlib
import json
import signal
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import LoggingConfig, TrainingConfig
from training.logger import Logger, plot_curves
from training.metrics import MetricAverager
from training.optim import EMA, learning_rate, make_optimizers
from training.resume import how_to_restart, is_finished, reject_foreign_checkpoint, require_same_run
from utils import distributed
from utils.checkpoints import load_tensors, load_weights, save_tensors, save_weights
from utils.device import hardware_name, is_out_of_memory
from utils.errors import Diverged, Stopped, UserError
from utils.files import warn_if_disk_full
from utils.images import save_png


class Trainer:
    """Network, EMA and optimizers of a run, and the folder with its files. Resumes from folder/state.pt.

        with Trainer(folder, net, cfg, ...) as trainer:
            for _ in trainer:                        # seeds PyTorch before each step; saves and stops between steps
                batch = ...                          # the same in all processes; this process uses batch[trainer.shard]
                trainer.step(forward_backward)       # calls forward_backward(micro_batch: slice), which calls
                                                     #     trainer.backward(loss, ...)
                if trainer.is_main and trainer.due(cfg.eval_every):
                    trainer.log(evaluate(trainer.ema.net))

    identity       settings and data fingerprints; a run with another identity in `folder` is an error
    weights_name   file for inference: EMA weights and the tensors of `extra`. Its header has `metadata` and the progress
    discriminator  has its own optimizer with a constant learning rate; saved only in state.pt
    data_verified  background check of the training data; an error in it ends training, and each save waits for its result
    """

    def __init__(
        self,
        folder: Path,
        net: nn.Module,
        cfg: TrainingConfig,
        *,
        identity: dict,
        seed: int,
        logging: LoggingConfig,
        weights_name: str,
        metadata: dict,
        extra: dict[str, Tensor] | None = None,
        discriminator: nn.Module | None = None,
        discriminator_lr: float = 0.0,
        data_verified: Future | None = None,
    ):
        self.folder, self.net, self.cfg, self.identity, self.seed = folder, net, cfg, identity, seed
        self.weights_path, self.metadata, self.extra = folder / weights_name, metadata, extra or {}
        self.is_main = distributed.is_main()
        shard = distributed.shard(cfg.batch_size)
        self.shard = slice(shard.start, shard.stop)  # part of the batch that this process trains on
        self.micro_batch = len(shard) if cfg.micro_batch == "auto" else min(cfg.micro_batch, len(shard))
        self.ema = EMA(net, cfg.ema_decay)
        self.optimizers, self.lr = make_optimizers(net, cfg), cfg.lr
        self.data_verified = data_verified
        self.discriminator = discriminator
        if discriminator is not None:
            self.discriminator_optimizer = torch.optim.AdamW(
                discriminator.parameters(), discriminator_lr, (0.5, 0.9), weight_decay=0.0
            )
        self.steps_done = 0  # optimizer steps
        self._minutes_before = 0.0  # minutes of training before this process started
        self._resume()
        # NCCL allocates its buffers in the first collective. micro_batch=auto may leave it no memory later.
        distributed.all_reduce_sum(torch.zeros(1, device=next(net.parameters()).device))
        # A network file system may show an old file for some seconds.
        distributed.require_same(
            self.steps_done, f"{folder}: the step of state.pt", "run the same command again in a minute"
        )
        self._first_step = self.steps_done
        self._restart_clocks()
        self._metrics = MetricAverager(next(net.parameters()).device)
        self._signal: int | None = None
        self._update_stop()
        if self.should_stop and self.is_main:
            self._save_if_stale()
        needs_logger = self.is_main and (not self.should_stop or cfg.steps == 0)
        self._logger = Logger(folder, identity, logging, self.steps_done) if needs_logger else None

    # The loop

    def __enter__(self) -> "Trainer":
        self._old_handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self._restart_clocks()
        # The bar shows how many percent of cfg.steps or cfg.max_minutes are done, whichever is more.
        self._bar = tqdm(
            total=100, initial=self._percent_done(), desc=self.folder.name, disable=self.should_stop or not self.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 20.0, bar_format="{l_bar}{bar}| [{elapsed}{postfix}]",
        )  # fmt: skip
        return self

    def __iter__(self) -> Iterator[int]:
        """Yield steps_done before each step, until cfg.steps or cfg.max_minutes is reached.

        After SIGINT or SIGTERM, saves the state and raises Stopped.
        """
        if self.cfg.steps == 0:
            self._raise_if_data_damaged(wait=True)
            return
        if self.should_stop:
            print(f"{self.folder}: already trained, {self.steps_done:,} steps in {self.minutes:.1f} minutes")
            return
        while not self.should_stop:
            # The randomness of a step is a function of (seed, step), so there is no generator state to save.
            torch.manual_seed((self.seed * 1_000_003 + self.steps_done) % 2**63)
            yield self.steps_done
            self._raise_if_data_damaged()
            if self._save_due():
                self.save()
        if not self.finished:
            distributed.barrier()  # wait until rank 0 has saved: torchrun ends all processes when one exits
            raise Stopped(
                f"stopped at step {self.steps_done} of {self.cfg.steps}; state saved in {self.folder}; "
                f"run the same command to resume",
                self._stopped_by,
            )
        tqdm.write(f"done: {self.weights_path} after {self.steps_done:,} steps, {self.minutes:.1f} minutes")

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._logger:
            self._logger.close()
            if self.steps_done > self._first_step:
                with warn_if_disk_full("the curves"):
                    plot_curves(self.folder)
        for number, handler in self._old_handlers.items():  # last: torchrun sends SIGTERM when another rank exits
            signal.signal(number, handler)

    @property
    def minutes(self) -> float:
        """Minutes of training, including those before the run was resumed."""
        return self._minutes_before + (time.monotonic() - self._started) / 60

    @property
    def images_seen(self) -> int:
        return self.steps_done * self.cfg.batch_size

    def due(self, every: int) -> bool:
        """Whether an action that runs every `every` steps is due now. Every action is due after the last step of the run."""
        return self.steps_done > self._first_step and (
            self.finished or (self.steps_done % every == 0 and not self.should_stop)
        )

    def _update_stop(self) -> None:
        """Decide once per step whether to stop, by the clock of rank 0 and the signals that any rank received."""
        minutes = self.minutes if self.is_main else 0.0
        self._minutes_synced, stopped_by = distributed.max_over_ranks([minutes, self._signal or 0])
        self._stopped_by = int(stopped_by) or None
        self.finished = is_finished(self.cfg, self.steps_done, self._minutes_synced)
        self.should_stop = self.finished or self._stopped_by is not None

    def _on_signal(self, number: int, _frame) -> None:
        if self._signal is not None:
            if number == signal.SIGINT:  # second Ctrl-C: exit without saving
                raise KeyboardInterrupt
            return  # service managers and torchrun may both send SIGTERM
        self._signal = number
        tqdm.write(f"stopping after this step ({signal.Signals(number).name})")

    # One step

    def step(self, forward_backward: Callable[[slice], None]) -> None:
        """Run one optimizer step: forward, backward, gradient clipping, optimizers, EMA.

        Calls forward_backward(micro_batch) with slices of this process's shard. If micro_batch is "auto", a micro-batch that
        does not fit in GPU memory is halved and the step starts over.
        """
        self.lr = learning_rate(self.cfg, self.steps_done, self._minutes_synced)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        # All processes draw the same batch and use their shards of it, but dropout needs different random numbers in each.
        if not self.is_main:
            torch.manual_seed((self.seed * 1_000_003 + self.steps_done) * 1009 % 2**63 + distributed.rank())
        self._accumulate_gradients(forward_backward)
        distributed.sum_gradients(self.net)
        grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.discriminator is not None and any(p.grad is not None for p in self.discriminator.parameters()):
            distributed.sum_gradients(self.discriminator)
            nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.cfg.grad_clip)
            self.discriminator_optimizer.step()
        self._zero_grad()
        self.ema.update(self.steps_done)
        self._metrics.watch_finite(grad_norm.detach(), self.steps_done)
        self._metrics.end_step(grad_norm=grad_norm)
        self.steps_done += 1
        if self.steps_done == self._first_step + 1:
            self._log_first_step(grad_norm)
        self._update_stop()
        self._bar.update(self._percent_done() - self._bar.n)
        if self.due(self.cfg.log_every):
            self.log_train_metrics()

    def _accumulate_gradients(self, forward_backward: Callable[[slice], None]) -> None:
        n = self.shard.stop - self.shard.start
        while True:
            try:
                for start in range(0, n, self.micro_batch):
                    forward_backward(slice(start, min(start + self.micro_batch, n)))
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.cfg.micro_batch != "auto" or self.micro_batch == 1:
                    raise UserError(
                        f"{self.folder}: out of memory with micro-batches of {self.micro_batch}; "
                        f"use a smaller micro_batch or fewer channels"
                    ) from None
            # This is outside the except block, because its traceback would keep the tensors of the failed pass alive.
            self.micro_batch = (self.micro_batch + 1) // 2
            self._metrics.discard_step()
            self._zero_grad()
            torch.cuda.empty_cache()
            self.print(f"out of GPU memory; continuing with micro-batches of {self.micro_batch}")

    def backward(self, loss: Tensor, check_finite: Tensor, timesteps: Tensor | None = None, **metrics: Tensor) -> None:
        """Backpropagate this micro-batch's part of the mean loss over the whole batch.

        loss          (B,) per example
        check_finite  (B,) values to check for NaN and infinity
        timesteps     (B,) diffusion timesteps, so that an error can name the one with the non-finite value
        metrics       (B,) per example, averaged until the next log line
        """
        self._backward(loss, {"loss": loss, **metrics})
        self._metrics.watch_finite(check_finite.detach(), self.steps_done, timesteps)

    def backward_discriminator(self, loss: Tensor, **metrics: Tensor) -> None:
        """Backpropagate the discriminator's loss (B,): this micro-batch's part of the mean over the whole batch."""
        self._backward(loss, metrics)

    def _backward(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        (loss.sum() / self.cfg.batch_size).backward()
        self._metrics.add_micro_batch(metrics, self.cfg.batch_size)

    def _zero_grad(self) -> None:
        self.net.zero_grad(set_to_none=True)
        if self.discriminator is not None:
            self.discriminator_optimizer.zero_grad(set_to_none=True)

    def _raise_if_diverged(self) -> None:
        step, timestep = self._metrics.first_nonfinite()
        if step < 0:
            return
        source = f"the loss at timestep {timestep}" if timestep >= 0 else "the loss or its gradient"
        saved = "the last saved state is kept" if (self.folder / "state.pt").exists() else "no state has been saved"
        raise Diverged(
            f"{self.folder}: {source} is not finite in step {step} (learning rate {self.lr:.3g}); {saved}. "
            f"Use a smaller lr, or precision=float32"
        )

    def _raise_if_data_damaged(self, wait: bool = False) -> None:
        if self.data_verified is not None and (wait or self.data_verified.done()):
            self.data_verified.result()

    # Logging

    def _percent_done(self) -> float:
        done = self.steps_done / max(1, self.cfg.steps)
        if self.cfg.max_minutes is not None:
            done = max(done, self.minutes / self.cfg.max_minutes)
        return 100 * min(done, 1.0)

    def _log_first_step(self, grad_norm: Tensor) -> None:
        """Log the duration of the first step, which includes compilation. If over 5 s, exclude it from max_minutes."""
        float(grad_norm)  # wait for the device
        seconds = time.monotonic() - self._started
        if seconds > 5:
            self.print(f"the first step took {seconds:.0f} s")
            self._started = time.monotonic()
        self.log({"seconds_to_first_step": round(seconds, 3)})

    def log_train_metrics(self) -> None:
        """Log the averages since the last call and update the progress bar. Raises Diverged."""
        self._raise_if_diverged()
        means = self._metrics.means()
        if not means:
            return
        metrics = {f"train/{name}": value for name, value in means.items()} | {"lr": self.lr}
        if self.steps_done == self._rate_start_step:  # no steps since the clock was restarted, so there is no rate
            self.log(metrics)
            return
        seconds = time.monotonic() - self._rate_start
        images_per_second = (self.steps_done - self._rate_start_step) * self.cfg.batch_size / max(seconds, 1e-9)
        self.log(metrics | {"images_per_second": images_per_second})
        minutes_left = (self.cfg.steps - self.steps_done) * self.cfg.batch_size / max(images_per_second, 1e-9) / 60
        if self.cfg.max_minutes is not None:
            minutes_left = min(minutes_left, max(0.0, self.cfg.max_minutes - self.minutes))
        clock = f"{int(minutes_left)}:{int(minutes_left * 60) % 60:02d}"
        self._bar.set_postfix_str(
            f"step {self.steps_done:,}, loss {means['loss']:.4f}, {images_per_second:.0f} images/s, {clock} left",
            refresh=False,
        )

    def log(self, metrics: dict[str, float]) -> None:
        """Write metrics of this step to metrics.jsonl, TensorBoard and the tracker."""
        if not self.is_main:
            return
        with warn_if_disk_full("the metrics"):
            self._logger.log_metrics(
                self.steps_done, {"images_seen": self.images_seen, "minutes": round(self.minutes, 3), **metrics}
            )
        self._restart_rate()

    def log_image(self, name: str, image, file: str) -> None:
        """Write a PIL image to the run's folder, TensorBoard and the tracker."""
        with warn_if_disk_full(file):
            save_png(image, self.folder / file)
            self._logger.log_image(self.steps_done, name, image)
        self._restart_rate()

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        tqdm.write(f"step {self.steps_done:,}: {text}")

    def _restart_clocks(self) -> None:
        self._started = self._saved_at = time.monotonic()
        self._restart_rate()

    def _restart_rate(self) -> None:
        """Restart the clock for images_per_second, which excludes evaluation, logging and saving."""
        self._rate_start, self._rate_start_step = time.monotonic(), self.steps_done

    # Saving

    def _save_due(self) -> bool:
        if self.steps_done == self._first_step or not self.is_main:
            return False
        return self.should_stop or time.monotonic() - self._saved_at > 60 * self.cfg.save_minutes

    def save(self) -> None:
        """Write the weights file, then state.pt. Raises Diverged instead of saving a non-finite state.

        If the disk is full, the previously saved files stay and training continues. Only the final save raises an error.
        """
        self._raise_if_diverged()
        self._raise_if_data_damaged(wait=True)
        state = dict(
            kind="state", identity=json.dumps(self.identity), step=self.steps_done, minutes=self.minutes,
            micro_batch_that_fit=[*self._hardware_key(), self.micro_batch],
            net=self.net.state_dict(), ema=self.ema.net.state_dict(), optimizers=[o.state_dict() for o in self.optimizers],
        )  # fmt: skip
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        with contextlib.nullcontext() if self.should_stop else warn_if_disk_full(f"the state of step {self.steps_done}"):
            # Weights come first: if the process dies before state.pt is written, the run resumes from the older state.pt and
            # writes the weights again.
            self._save_weights(self.weights_path)
            save_tensors(self.folder / "state.pt", state)
        self._saved_at = time.monotonic()
        self._restart_rate()

    def save_snapshot(self) -> None:
        """Keep the current weights in snapshots/. Raises Diverged instead of saving non-finite weights."""
        self._raise_if_diverged()
        self._raise_if_data_damaged(wait=True)
        with warn_if_disk_full("a snapshot"):
            self._save_weights(self.folder / "snapshots" / f"step_{self.steps_done:07d}.safetensors")
        self._restart_rate()

    def _save_weights(self, path: Path) -> None:
        progress = dict(step=self.steps_done, steps=self.cfg.steps, minutes=self.minutes, complete=self.finished)
        save_weights(path, {**self.ema.net.state_dict(), **self.extra}, {**self.metadata, **progress})

    def _save_if_stale(self) -> None:
        """Rewrite the weights file of a finished run if it is missing, damaged or older than state.pt."""
        try:
            _, metadata = load_weights(self.weights_path, self.metadata["kind"], "")
        except UserError:
            metadata = {}
        if metadata.get("step") != self.steps_done or not metadata.get("complete"):
            self.save()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = load_tensors(path, how_to_restart(path))
        require_same_run(self.folder, self.identity, self.cfg, state)
        with reject_foreign_checkpoint(path):
            self.net.load_state_dict(state["net"])
            self.ema.net.load_state_dict(state["ema"])
            states = state["optimizers"] if "optimizers" in state else [state["optimizer"]]  # written before Muon was added
            for optimizer, optimizer_state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(optimizer_state)
            if self.discriminator is not None:
                self.discriminator.load_state_dict(state["discriminator"])
                self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
            self.steps_done, self._minutes_before = int(state["step"]), float(state["minutes"])
            *hardware_key, micro_batch_that_fit = state["micro_batch_that_fit"]
        if self.cfg.micro_batch == "auto" and hardware_key == self._hardware_key():
            # Start with the size found before the interruption: no new out-of-memory errors and recompilations.
            self.micro_batch = min(self.micro_batch, micro_batch_that_fit)

    def _hardware_key(self) -> list:
        """Hardware and number of processes, on which the micro-batch size that fits in memory depends."""
        return [hardware_name(next(self.net.parameters()).device), distributed.world_size()]
