"""Optimizers, EMA of the weights, and the learning rate schedule."""

import copy
import math

import torch
from torch import Tensor, nn

from config import TrainingConfig

# Coefficients and number of steps of Muon's quintic Newton-Schulz iteration (Jordan et al. 2024)
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
ADAMW_RMS = 0.2  # typical RMS of AdamW's updates, relative to the learning rate (Liu et al. 2025, §2.2)


def make_optimizers(net: nn.Module, cfg: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for muon_weights() and AdamW for the others. `net` is a UNet or VAE."""
    muon_params = muon_weights(net) if cfg.optimizer == "muon" else []
    muon_ids = {id(p) for p in muon_params}
    adamw_params = [p for p in net.parameters() if id(p) not in muon_ids]
    optimizers = [torch.optim.AdamW(adamw_params, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)]
    return optimizers + ([Muon(muon_params, lr=cfg.lr, weight_decay=cfg.weight_decay)] if muon_params else [])


def muon_weights(net: nn.Module) -> list[nn.Parameter]:
    """Weights of the linear layers and convolutions that map features to features (see `outer_layers` of UNet and VAE)."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in net.outer_layers]
    return [layer.weight for layer in layers]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum with orthogonalized updates, for weights (out, in) and (out, in, k, k).

    Updates are scaled to the typical RMS of AdamW's updates, so that both optimizers can share a learning rate (Liu et al.
    2025, eq. 4). torch.optim.Muon does not support convolutions.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            batches: dict[tuple | int, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    batches.setdefault(batch_key(p), []).append(p)
            for params in batches.values():
                # Moving the input channels last makes channels_last weights contiguous, so flattening does not copy them.
                updates = [self._nesterov(p, group["momentum"]).movedim(1, -1) for p in params]
                matrices = orthogonalize(torch.stack([update.flatten(1) for update in updates]))
                for p, update, matrix in zip(params, updates, matrices):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    step = group["lr"] * ADAMW_RMS * max(matrix.shape) ** 0.5
                    p.sub_(matrix.view(update.shape).movedim(-1, 1), alpha=step)

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Update the momentum buffer (an EMA of the gradient) and return the Nesterov update."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def batch_key(p: nn.Parameter) -> tuple | int:
    """Weights with equal keys are orthogonalized by batched products, which are faster on GPUs but slower on CPUs."""
    return (len(p), p[0].numel()) if p.is_cuda else id(p)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix (B, m, n) by values from about 0.7 to 1.2.

    Iterates on the Gram matrix X Xᵀ (m, m) instead of X. For n >> m, as in 3x3 convolutions, this is several times cheaper.
    Singular values below about 1e-3 of the Frobenius norm end below 0.7.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    gram, (a, b, c) = matrices @ matrices.mT, NEWTON_SCHULZ
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] + 1e-30
    gram = gram / squared_norm  # eigenvalues: squared singular values of X = matrices / Frobenius norm, at most 1
    identity = torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    product = squared_norm.rsqrt() * identity
    for i in range(NEWTON_SCHULZ_STEPS):
        polynomial = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = polynomial @ product
        if i < NEWTON_SCHULZ_STEPS - 1:
            gram = polynomial @ gram @ polynomial
    return product @ matrices


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
