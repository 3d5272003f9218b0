"""Measure which fraction of generated faces has the requested attributes, using a classifier trained on synthetic faces.

    python tools/judge_conditions.py configs/demo_classes.yaml [more configs ...] [section.key=value ...]

Trains the classifier (about three minutes on two CPU cores). Then classifies faces generated with guidance, without
guidance, and without a condition (the base rate). The fraction for faces reconstructed by the VAE is the upper limit for
the U-Net.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from dataset import synthetic_faces
from evaluation.condition_match import with_guidance
from evaluation.reconstruction import reconstruct
from evaluation.reports import markdown_table
from models.conditioning import Cond, LabelEmbedder
from pipeline.generate import OutputSpec
from pipeline.latent_diffusion import LatentDiffusion, check_guidance
from pipeline.prompts import read_prompts
from utils import cli
from utils.device import autocast, hardware_name, pick_device, pick_precision
from utils.errors import UserError
from utils.images import to_float

ATTRIBUTES = synthetic_faces.ATTRIBUTES
CAPTION_ATTRIBUTES = [name for name in ATTRIBUTES if name not in ("backdrop", "light")]  # mentioned in captions
TRAIN_SEED, EVAL_SEED = 1001, 1002  # different from the seed of the images that the models were trained on
TRAIN_IMAGES, VAL_IMAGES, EPOCHS, BATCH_SIZE = 24_000, 2_000, 4, 96
EVAL_IMAGES = 512


class Classifier(nn.Module):
    """Map images (B, 3, H, W) to one tensor of logits (B, number of values) per attribute."""

    def __init__(self):
        super().__init__()
        self.num_values, layers, in_channels = [len(values) for values in ATTRIBUTES.values()], [], 3
        for channels in (32, 64, 128, 192):
            layers += [nn.Conv2d(in_channels, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            in_channels = channels
        self.net = nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * 192, 256),
            nn.ReLU(),
            nn.Linear(256, sum(self.num_values)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x).float().split(self.num_values, dim=1)


def imitate_vae(x: Tensor) -> Tensor:
    """Add slight blur and noise to about half of the images, so that the classifier also works on decoded images."""
    blurred = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear")
    strength = torch.rand(len(x), 1, 1, 1, device=x.device) * (torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5)
    return torch.lerp(x, blurred, strength) + 0.03 * strength * torch.randn_like(x)


@torch.no_grad()
def classify(net: Classifier, pixels: np.ndarray, device: torch.device, dtype: torch.dtype) -> np.ndarray:
    """Predict the value of each attribute: uint8 (N, H, W, 3) -> int64 indices (N, number of attributes)."""
    values = []
    with autocast(device, dtype):
        for batch in torch.from_numpy(pixels).split(256):
            values.append(torch.stack([logits.argmax(1) for logits in net(to_float(batch).to(device))], dim=1).cpu())
    return torch.cat(values).numpy()


def train_classifier(size: int, device: torch.device, dtype: torch.dtype) -> Classifier:
    torch.manual_seed(0)
    indices = np.arange(TRAIN_IMAGES + VAL_IMAGES)
    pixels = synthetic_faces.render(TRAIN_SEED, indices, size)
    labels = torch.from_numpy(synthetic_faces.labels(TRAIN_SEED, indices))
    net = Classifier().to(device, memory_format=torch.channels_last)
    steps = EPOCHS * (TRAIN_IMAGES // BATCH_SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN_IMAGES).split(BATCH_SIZE)[: TRAIN_IMAGES // BATCH_SIZE]:
            x, y = imitate_vae(to_float(torch.from_numpy(pixels[rows.numpy()])).to(device)), labels[rows].to(device)
            with autocast(device, dtype):
                loss = sum(F.cross_entropy(logits, y[:, k]) for k, logits in enumerate(net(x)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    correct = classify(net, pixels[TRAIN_IMAGES:], device, dtype) == labels[TRAIN_IMAGES:].numpy()
    accuracies = zip(ATTRIBUTES, correct.mean(axis=0))
    print("accuracy of the classifier on validation faces: " + ", ".join(f"{name} {a:.1%}" for name, a in accuracies))
    return net


def requested_conditions(config: Config, model: LatentDiffusion, indices: np.ndarray) -> tuple[list[str], Cond]:
    """Return the attributes that the model is conditioned on, and the conditions of the synthetic faces at `indices`."""
    conditioner = model.unet.conditioner
    if conditioner is None:
        raise UserError(f"{model.checkpoint.path} is unconditional: train with diffusion.condition=class or text")
    if isinstance(conditioner, LabelEmbedder):
        names = list(conditioner.names)
        if any(list(ATTRIBUTES.get(name, ())) != values for name, values in conditioner.names.items()):
            raise UserError(
                f"{model.checkpoint.path} was not trained with data.source=synthetic_faces (its labels are "
                f"{', '.join(names)}): use a model trained with it"
            )
        columns = [list(ATTRIBUTES).index(name) for name in names]
        return names, (torch.from_numpy(synthetic_faces.labels(EVAL_SEED, indices)[:, columns]).to(model.device),)
    captions = {"prompts": synthetic_faces.captions(EVAL_SEED, indices), "labels": None}
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=captions)})
    return CAPTION_ATTRIBUTES, read_prompts(config, conditioner, model.device).cond


def judge(config: Config, classifiers: dict[int, Classifier]) -> None:
    """Print how often samples of a model have the requested attributes.

    classifiers: image size -> trained classifier; a missing one is trained and added
    """
    device, cfg = pick_device(config.device), config.sampling
    dtype = pick_precision("auto", device)
    if cfg.autoguidance is not None:
        raise UserError("judge_conditions.py compares scales of classifier-free guidance: unset sampling.autoguidance")
    model = LatentDiffusion.load(config, device, dtype)
    scales = sorted({0.0, 1.0, cfg.guidance})
    indices = np.arange(EVAL_IMAGES)
    names, cond = requested_conditions(config, model, indices)
    for guidance in scales:
        check_guidance(with_guidance(cfg, guidance), model.unet, model.checkpoint)
    size = model.image_shape[0]
    net = classifiers[size] = classifiers.get(size) or train_classifier(size, device, dtype)
    labels = synthetic_faces.labels(EVAL_SEED, indices)
    pixels = synthetic_faces.render(EVAL_SEED, indices, model.image_shape[0])
    columns = [list(ATTRIBUTES).index(name) for name in names]

    def accuracy(pixels: np.ndarray) -> np.ndarray:
        return (classify(net, pixels, device, dtype) == labels)[:, columns].mean(axis=0)

    accuracies = {
        "original faces": accuracy(pixels),
        "reconstructed": accuracy(reconstruct(model.vae, pixels, cfg.batch_size, device, dtype)),
    }
    for guidance in scales:
        label = {0.0: "unconditional", 1.0: "no guidance"}.get(guidance, f"guidance {guidance:g}")
        settings = with_guidance(cfg, guidance).model_copy(update={"cols": 1, "slerp_to": None})
        samples = model.generate(settings, OutputSpec(EVAL_IMAGES, keep_pixels=EVAL_IMAGES), cond)
        accuracies[label] = accuracy(samples.pixel_array())
    rows = [[name, *(f"{values[k]:.1%}" for values in accuracies.values())] for k, name in enumerate(names)]
    rows.append(["mean", *(f"{values.mean():.1%}" for values in accuracies.values())])
    print(
        f"fraction of {EVAL_IMAGES} faces with the requested attribute, {cfg.sampler} with {cfg.steps} steps, "
        f"on {hardware_name(device)}:\n"
    )
    print(markdown_table(["attribute", *accuracies], rows))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    configs = [argument for argument in argv if argument.endswith(".yaml") and "=" not in argument]
    if not configs or cli.HELP_FLAGS & set(argv):
        print(__doc__.strip())
        return 0 if configs or argv else 2
    classifiers: dict[int, Classifier] = {}
    try:
        for path in configs:
            judge(cli.parse([path, *(argument for argument in argv if argument not in configs)])[0], classifiers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
