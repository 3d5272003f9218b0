"""EMA of the weights and the learning rate schedule."""

import copy
import math

import torch
from torch import nn

from config import TrainingConfig


def learning_rate(cfg: TrainingConfig, step: int, minutes: float = 0.0) -> float:
    """Learning rate of a step: linear warm-up to cfg.lr, followed by a constant rate or by cosine decay to cfg.lr / 10.

    The decay ends at the last step or at max_minutes, whichever comes first.
    """
    lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
    if cfg.lr_decay == "cosine":
        progress = min(1.0, max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
        if cfg.max_minutes is not None:
            progress = max(progress, min(1.0, minutes / cfg.max_minutes))
        lr *= 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
    return lr


class EMA:
    """`.net` is a copy of a network whose parameters are the exponential moving averages of the network's parameters."""

    def __init__(self, net: nn.Module, decay: float):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay
        self._ema_params, self._params = list(self.net.parameters()), list(net.parameters())

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Update the averages with decay min(decay, (1+n)/(10+n)), where n is the number of previous updates."""
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self._ema_params, self._params, 1 - decay)
