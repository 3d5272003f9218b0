"""Feature networks, and distances between sets of pictures in their features.

A figure belongs to its network: `Features.name` stands beside every one, and figures of two networks are never compared.
The distances themselves are torch-fidelity's.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import spread
from lab.artifacts import first_line
from lab.errors import UserError

NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID (Bińkowski et al. 2018)


@dataclass
class Features:
    """name -> what a figure is called by; `of` takes uint8 (B, 3, H, W) and gives (B, D) float32."""

    name: str
    of: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(
        self, pixels: np.ndarray, batch_size: int, rows: np.ndarray | None = None, mirrored: bool = False
    ) -> Tensor:
        """uint8 (N, H, W, 3), all of them or those at `rows` -> (N, D) on the CPU. No more than a batch is read at once."""
        rows, found = np.arange(len(pixels)) if rows is None else rows, []
        for start in range(0, len(rows), batch_size):
            part = torch.from_numpy(pixels[rows[start : start + batch_size]]).permute(0, 3, 1, 2).to(self.device)
            found.append(self.of(part.flip(3) if mirrored else part).float().cpu())
        return torch.cat(found)


def make_features(name: str, weights: str | None, device: torch.device) -> Features:
    """`inception`: the FID network, by torch-fidelity's download or a local copy. `mobilenet_v2`, `mobilenet_v2_keras`: torchvision's
    network with its own weights, or with those of Keras (local only); a stand-in where Inception cannot be had.

    Raises UserError saying what to put where.
    """
    try:
        return {"inception": _inception, "mobilenet_v2": _mobilenet, "mobilenet_v2_keras": _mobilenet_keras}[name](
            weights, device
        )
    except UserError:
        raise
    except Exception as error:  # no network, a file that is no weights file, other shapes: many types
        raise UserError(
            f"evaluation.features={name}: its weights cannot be loaded ({first_line(error)}); name a local file with "
            f"evaluation.weights=FILE, or another network with evaluation.features"
        ) from None


def _inception(weights: str | None, device: torch.device) -> Features:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        torch.load(weights, weights_only=True)  # torch-fidelity itself would execute what a hostile file holds
    net = (
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
        .to(device)
        .eval()
    )
    return Features("Inception", lambda x: net(x)[0], device)


def _mobilenet(weights: str | None, device: torch.device) -> Features:
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    if weights is None:
        net = mobilenet_v2(weights=MobileNet_V2_Weights.IMAGENET1K_V1)
    else:
        net = mobilenet_v2()
        net.load_state_dict(torch.load(weights, weights_only=True))
    net = net.features.to(device).eval()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return Features("MobileNetV2", lambda x: net((resized(x) / 255 - mean) / std).mean(dim=(2, 3)), device)


class _PadAsKeras(nn.Module):
    """Keras pads strided convolutions at the right and the bottom only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))


def _mobilenet_keras(weights: str | None, device: torch.device) -> Features:
    from torchvision.models import mobilenet_v2

    if weights is None:
        raise UserError("evaluation.features=mobilenet_v2_keras has no download: name its file with evaluation.weights=FILE")
    net = mobilenet_v2()
    net.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in torch.load(weights, weights_only=True).items()}
    )
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                child.padding = (0, 0)
                setattr(module, name, nn.Sequential(_PadAsKeras(), child))
    net = net.features.to(device).eval()
    return Features("MobileNetV2 (Keras weights)", lambda x: net(resized(x) / 127.5 - 1).mean(dim=(2, 3)), device)


def resized(x: Tensor, size: int = 128) -> Tensor:
    """uint8 (B, 3, H, W) -> float at size×size: small pictures would shrink to nothing in five halvings."""
    return x.float() if x.shape[-1] >= size else F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True)


# Distances between features (N, D) and (M, D)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to both (Heusel et al. 2017). Biased: it falls with N."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = (fid_features_to_statistics(x.double()) for x in (a, b))
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Kernel distance (Bińkowski et al. 2018) and its standard deviation over subsets of half the pictures, at most SUBSET_SIZE.
    Unbiased: it may be a little below 0."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET_SIZE, len(a) // 2, len(b) // 2)
    found = kid_features_to_metric(a.double(), b.double(), kid_subsets=SUBSETS, kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of generated pictures near a real one, and of real ones near a generated one (Kynkäänniemi et al. 2019), of as many real
    ones, spread over all, as there are generated ones."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real = spread(real, len(generated))
    # In parts, or all distances between real ones would be held at once.
    found = prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
