"""Adversarial loss of the VAE (Esser et al. 2021, eq. 6 and 7; Isola et al. 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import group_norm, num_norm_groups

MAX_ADAPTIVE_WEIGHT = 1e4  # limit for a vanishing adversarial gradient, as in the VQGAN code


class PatchDiscriminator(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2), one per 70x70 patch; positive means real.

    GroupNorm replaces the paper's BatchNorm, so that logits do not depend on the batch.
    """

    def __init__(self, width: int = 64, levels: int = 3, in_channels: int = 3):
        super().__init__()
        layers, ch = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for level in range(1, levels + 1):
            c_out = width * min(2**level, 8)
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(ch, c_out, 4, stride=stride, padding=1, bias=False)]
            layers += [group_norm(c_out, num_norm_groups([c_out])), nn.LeakyReLU(0.2)]
            ch = c_out
        self.net = nn.Sequential(*layers, nn.Conv2d(ch, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).float()


def generator_loss(logits: Tensor) -> Tensor:
    """Adversarial loss of the generator per image, (B,)."""
    return -logits.mean(dim=(1, 2, 3))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss per image, (B,) (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3))


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Return the adaptive weight of the adversarial loss (Esser et al. 2021, eq. 7).

    It is the gradient norm of the reconstruction loss divided by the gradient norm of the adversarial loss, both taken at
    the decoder's last layer. The result is detached. The autograd graphs of the losses are retained.
    """
    reconstruction_norm, adversarial_norm = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial_loss)
    )
    return (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(max=MAX_ADAPTIVE_WEIGHT).detach()
