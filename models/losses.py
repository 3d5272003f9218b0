"""Perceptual distances between images (B, 3, H, W) in [-1, 1]; each returns one number per image, (B,), with gradient."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

LPIPS_BACKBONES = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG19_TAPS = (3, 8, 11)  # features[i]: relu1_2, relu2_2, relu3_1


def perceptual_weights(net: str, weights: str | None) -> Path:
    """Where the backbone's weights are, downloading them if they are nowhere. Raises FileNotFoundError naming the ways out."""
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"vae.perceptual.weights: {weights} is not a file")
        return Path(weights)
    import torchvision.models as zoo

    url = getattr(zoo, "VGG19_Weights" if net == "vgg19" else LPIPS_BACKBONES[net]).IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rsplit("-", 1)[1])
        except Exception as error:  # no network, a proxy's page, a full disk: the ways out are the same
            raise FileNotFoundError(
                f"the weights of vae.perceptual.net={net} are not in torchvision's cache and cannot be downloaded ({error}). "
                f"Three ways out: put {url} at {cached}; name a local copy with vae.perceptual.weights=FILE; "
                f"or train without, vae.perceptual.net=none"
            ) from None
    return cached


def make_perceptual(net: str, weights: Path) -> nn.Module:
    """The distance `net` on backbone weights from a file; frozen, in eval mode, with its name in `.title`.

    Raises ValueError for a file that does not hold that backbone.
    """
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        distance = VGG19Distance(state) if net == "vgg19" else LPIPS(net, state, official=_is_torchvisions(weights))
    except Exception as error:  # a truncated file, a pickle that wants to run code, another network
        raise ValueError(f"{weights} does not hold the weights of {net}: {error!r:.160}") from None
    return distance.eval().requires_grad_(False)


def _is_torchvisions(weights: Path) -> bool:
    """torchvision's file names end in the first 8 digits of the file's SHA-256; those digits are what we compare."""
    import torchvision.models as zoo

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    prefixes = [
        getattr(zoo, name).IMAGENET1K_V1.url.rsplit("-", 1)[1].removesuffix(".pth") for name in LPIPS_BACKBONES.values()
    ]
    return any(digest.startswith(prefix) for prefix in prefixes)


class LPIPS(nn.Module):
    """LPIPS v0.1 by the `lpips` package, its backbone loaded from a torchvision state dict.

    The package's linear heads fit torchvision's own weights only; on any other file the plain feature distance is
    used, and the title says so.
    """

    def __init__(self, net: str, state: dict[str, Tensor], official: bool):
        super().__init__()
        import lpips

        self.title = f"LPIPS ({net})" if official else f"{net} distance (not LPIPS: other weights than torchvision's)"
        self.metric = lpips.LPIPS(net=net, pnet_rand=True, lpips=official, verbose=False)
        # One 1x1 convolution per tap, or the plain sum over channels.
        self.heads = self.metric.lins if official else [lambda d: d.sum(dim=1, keepdim=True)] * self.metric.L
        backbone = self.metric.net
        # The package cuts features into slice1 … sliceN and keeps torchvision's numbering inside them.
        wanted = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
        backbone.load_state_dict({name: state[source] for name, source in wanted.items()})

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # The package's own forward, but for unit(): its division by |x| has no gradient where all features are zero.
        metric, total = self.metric, 0.0
        for one, two, head in zip(*(metric.net(metric.scaling_layer(x)) for x in (a, b)), self.heads):
            total = total + head((unit(one) - unit(two)).square()).mean(dim=(1, 2, 3))
        return total  # (B,)


def unit(features: Tensor) -> Tensor:
    """Features (B, C, h, w) scaled to unit length over channels, float32; zero where all are zero."""
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


class VGG19Distance(nn.Module):
    """Feature distance on VGG19 up to relu3_1: per tap the squared difference of features scaled to unit length over
    channels, averaged over positions; the sum over three taps. Like LPIPS (Zhang et al. 2018, eq. 1) without its heads."""

    title = "VGG19 distance"

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        import torchvision.models as zoo

        self.features = zoo.vgg19(weights=None).features[: VGG19_TAPS[-1] + 1]
        self.features.load_state_dict({name: state["features." + name] for name in self.features.state_dict()})
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = 0.0
        for one, two in zip(self.taps(a), self.taps(b)):
            total = total + (unit(one) - unit(two)).square().sum(dim=1).mean(dim=(1, 2))
        return total  # (B,)

    def taps(self, images: Tensor) -> list[Tensor]:
        """relu1_2 (B, 64, H, W), relu2_2 (B, 128, H/2, W/2), relu3_1 (B, 256, H/4, W/4)."""
        h, taps = ((images + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in VGG19_TAPS:
                taps.append(h)
        return taps
