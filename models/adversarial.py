"""The adversarial term of a VAE's loss (Esser et al. 2021, eq. 6 and 7; Isola et al. 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import norm

MOST_WEIGHT = 1e4  # of the adaptive weight, as in the paper's code: where the adversarial gradient vanishes it would explode


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2), one for each patch of 70 pixels: above 0 says real.

    GroupNorm stands in for the paper's BatchNorm: what it says of an image does not depend on the batch.
    """

    def __init__(self, width: int = 64, levels: int = 3):
        super().__init__()
        layers, channels = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for level in range(1, levels + 1):
            wider = width * min(2**level, 8)
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False), norm(wider), nn.LeakyReLU(0.2)]
            channels = wider
        self.net = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).float()


def generator_loss(logits: Tensor) -> Tensor:
    """(B,): the generator wants its images called real."""
    return -logits.mean(dim=(1, 2, 3))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017), (B,)."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(dim=(1, 2, 3))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|grad of the reconstruction loss| / |grad of the adversarial loss| at the decoder's last layer (eq. 7), a number without
    gradient: neither term then drowns the other. Both losses are means (scalars) over the same images; their graph is kept."""
    there = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial)
    ]
    return (there[0] / (there[1] + 1e-4)).clamp(max=MOST_WEIGHT).detach()
