"""Feature networks, and distances between sets of images in their features.

Distances in the features of different networks are not comparable.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import evenly_spaced
from models.perceptual import to_rgb
from utils.errors import UserError
from utils.files import first_line
from utils.images import to_float, to_uint8

PRC_NEIGHBORS = 3  # Kynkäänniemi et al. 2019
KID_SUBSETS, MAX_KID_SUBSET = 100, 1000  # Bińkowski et al. 2018


@dataclass
class Features:
    """A feature network: uint8 (N, H, W, C) -> float32 (N, D) on the CPU. The network sees to_rgb(images)."""

    name: str  # in reports
    forward: Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> (B, D)
    device: torch.device

    @torch.no_grad()
    def __call__(
        self, pixels: np.ndarray, batch_size: int, rows: np.ndarray | None = None, mirrored: bool = False
    ) -> Tensor:
        """Return the features of all images or of those at `rows`."""
        rows, features = np.arange(len(pixels)) if rows is None else rows, []
        for start in range(0, len(rows), batch_size):
            batch = torch.from_numpy(pixels[rows[start : start + batch_size]])
            if batch.shape[3] != 3:
                batch = torch.from_numpy(to_uint8(to_rgb(to_float(batch))))
            batch = batch.permute(0, 3, 1, 2).to(self.device)
            features.append(self.forward(batch.flip(3) if mirrored else batch).float().cpu())
        return torch.cat(features)


def make_features(name: str, weights: str | None, device: torch.device) -> Features:
    """Build a feature network. `weights` is a local file; None: download.

    Inception is the network of FID. MobileNet is a substitute if its weights are not available.
    """
    networks = {"inception": _inception, "mobilenet_v2": _mobilenet, "mobilenet_v2_keras": _mobilenet_keras}
    try:
        return networks[name](weights, device)
    except UserError:
        raise
    except Exception as error:  # no internet, not a weights file: many exception types
        raise UserError(
            f"evaluation.features={name}: its weights cannot be loaded ({first_line(error)}): name a local file with "
            f"evaluation.weights=FILE, or choose another network with evaluation.features"
        ) from None


def _inception(weights: str | None, device: torch.device) -> Features:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        torch.load(weights, weights_only=True)  # torch-fidelity would execute pickled code
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    net = net.to(device).eval()
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
    return Features("MobileNetV2", lambda x: net((upsample(x) / 255 - mean) / std).mean(dim=(2, 3)), device)


class _PadLikeKeras(nn.Module):
    """Keras pads strided convolutions only on the right and at the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))


def _mobilenet_keras(weights: str | None, device: torch.device) -> Features:
    from torchvision.models import mobilenet_v2

    if weights is None:
        raise UserError("evaluation.features=mobilenet_v2_keras has no download: name its file with evaluation.weights=FILE")
    net = mobilenet_v2()
    state = torch.load(weights, weights_only=True)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                child.padding = (0, 0)
                setattr(module, name, nn.Sequential(_PadLikeKeras(), child))
    net = net.features.to(device).eval()
    return Features("MobileNetV2 (Keras weights)", lambda x: net(upsample(x) / 127.5 - 1).mean(dim=(2, 3)), device)


def upsample(x: Tensor, size: int = 128) -> Tensor:
    """uint8 (B, 3, H, W) -> float, shorter side at least `size`: MobileNet halves the resolution five times."""
    height, width = x.shape[2:]
    short = min(height, width)
    if short >= size:
        return x.float()
    larger = round(size * height / short), round(size * width / short)
    return F.interpolate(x.float(), larger, mode="bilinear", antialias=True)


# Distances between features (N, D) and (M, D)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two fitted Gaussians (Heusel et al. 2017). Biased: it decreases with N."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = (fid_features_to_statistics(x.double()) for x in (a, b))
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Kernel distance (Bińkowski et al. 2018), mean and std over random subsets. Unbiased, so it can be negative."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(MAX_KID_SUBSET, len(a) // 2, len(b) // 2)
    metrics = kid_features_to_metric(a.double(), b.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    return metrics[KEY_METRIC_KID_MEAN], metrics[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Fraction of generated images near a real one, and of real ones near a generated one (Kynkäänniemi et al. 2019)."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real = evenly_spaced(real, len(generated))  # both metrics depend on the numbers of images
    metrics = prc_features_to_metric(
        generated, real, prc_neighborhood=PRC_NEIGHBORS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return metrics[KEY_METRIC_PRECISION], metrics[KEY_METRIC_RECALL]
