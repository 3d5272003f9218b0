"""Do generated portraits show what was asked for? A classifier that never saw a generated picture says so.

    python tests/judge.py configs/demo_classes.yaml [more configs ...] [section.key=value ...]

Trains a small classifier of all attributes on fresh portraits of sources/synthetic_faces.py, checks it on held-out ones, then draws
portraits under conditions of further ones and prints, for each attribute asked for, the share that carry it: with the config's
guidance, without guidance, and unconditionally (the base rate). Beside it the share for the VAE's reconstructions of the true portraits:
what a perfect U-Net would score. About three minutes on two CPU cores.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from data import to_float, to_uint8  # noqa: E402
from lab import cli  # noqa: E402  (before torch: it sets how torch allocates)
from latent_diffusion import LatentDiffusion  # noqa: E402
from models.conditioning import Labels  # noqa: E402
from sampling import image_generators, randn, sample  # noqa: E402
from sources import synthetic_faces  # noqa: E402
from training import autocast, hardware, pick_device, pick_precision  # noqa: E402

NAMES = synthetic_faces.ATTRIBUTES
IN_CAPTIONS = [name for name in NAMES if name not in ("backdrop", "light")]
TRAIN_SEED, JUDGE_SEED = 1001, 1002  # not the training data's
TRAIN_IMAGES, HELD_OUT, EPOCHS, BATCH = 24_000, 2_000, 4, 96
IMAGES = 512


class Classifier(nn.Module):
    """Pictures (B, 3, H, W) -> logits of every value of every attribute."""

    def __init__(self):
        super().__init__()
        self.sizes, layers, before = [len(values) for values in NAMES.values()], [], 3
        for width in (32, 64, 128, 192):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.net = nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * 192, 256),
            nn.ReLU(),
            nn.Linear(256, sum(self.sizes)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x).float().split(self.sizes, dim=1)


def soften(x: Tensor) -> Tensor:
    """Half of the pictures a little blurred and noisy, as what comes out of a VAE is."""
    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear")
    share = torch.rand(len(x), 1, 1, 1, device=x.device) * (torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5)
    return torch.lerp(x, small, share) + 0.03 * share * torch.randn_like(x)


def predict(net: Classifier, pixels: np.ndarray, device, dtype) -> np.ndarray:
    """uint8 (N, H, W, 3) -> values (N, attributes)."""
    found = []
    with torch.no_grad(), autocast(device, dtype):
        for part in torch.from_numpy(pixels).split(256):
            found.append(torch.stack([logits.argmax(1) for logits in net(to_float(part).to(device))], dim=1).cpu())
    return torch.cat(found).numpy()


def train(size: int, device, dtype) -> Classifier:
    """Prints how well it does on held-out portraits."""
    torch.manual_seed(0)
    indices = np.arange(TRAIN_IMAGES + HELD_OUT)
    pixels = synthetic_faces.render(TRAIN_SEED, indices, size)
    labels = torch.from_numpy(synthetic_faces.labels(TRAIN_SEED, indices))
    net = Classifier().to(device, memory_format=torch.channels_last)
    steps = EPOCHS * (TRAIN_IMAGES // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAIN_IMAGES).split(BATCH)[: TRAIN_IMAGES // BATCH]:
            x, y = soften(to_float(torch.from_numpy(pixels[rows.numpy()])).to(device)), labels[rows].to(device)
            with autocast(device, dtype):
                loss = sum(F.cross_entropy(logits, y[:, k]) for k, logits in enumerate(net(x)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    right = (predict(net, pixels[TRAIN_IMAGES:], device, dtype) == labels[TRAIN_IMAGES:].numpy()).mean(axis=0)
    print("classifier on held-out portraits: " + ", ".join(f"{name} {r:.1%}" for name, r in zip(NAMES, right)))
    return net


def judge(config, net: Classifier | None) -> Classifier:
    device = pick_device(config.device)
    dtype, s = pick_precision("auto", device), config.sampling
    model = LatentDiffusion(config, device, dtype)
    conditioner = model.unet.conditioner
    net = net or train(model.image_size, device, dtype)
    indices = np.arange(IMAGES)
    truth, pixels = (
        synthetic_faces.labels(JUDGE_SEED, indices),
        synthetic_faces.render(JUDGE_SEED, indices, model.image_size),
    )
    if isinstance(conditioner, Labels):
        asked = list(conditioner.names)
        raw = (torch.from_numpy(truth[:, [list(NAMES).index(name) for name in asked]]).to(device),)
    else:
        asked = IN_CAPTIONS
        raw = (conditioner.encode(synthetic_faces.captions(JUDGE_SEED, indices))[0].to(device),)
    columns = [list(NAMES).index(name) for name in asked]

    def carried(images: np.ndarray) -> np.ndarray:
        return (predict(net, images, device, dtype) == truth)[:, columns].mean(axis=0)

    def drawn(guidance: float) -> np.ndarray:
        settings, parts = s.model_copy(update={"guidance": guidance}), []
        for start in range(0, IMAGES, s.batch_size):
            rows = range(start, min(start + s.batch_size, IMAGES))
            generators = image_generators(s.seed, rows, "cpu")
            z = sample(model.denoiser(settings, tuple(r[list(rows)] for r in raw)), randn((len(rows), *model.shape), generators, device),
                       model.schedule, s.sampler, s.steps, **model.options(s), x0_range=model.threshold(s.x0_clamp), generator=generators)  # fmt: skip
            parts.append(to_uint8(model.decode(z)))
        return np.concatenate(parts)

    reconstructed = [
        to_uint8(model.decode(model.encode(to_float(part)))) for part in torch.from_numpy(pixels).split(s.batch_size)
    ]
    columns_of = {"true portraits": carried(pixels), "reconstructed": carried(np.concatenate(reconstructed))}
    for guidance in sorted({0.0, 1.0, s.guidance}):
        name = {0.0: "unconditional", 1.0: "no guidance"}.get(guidance, f"guidance {guidance:g}")
        columns_of[name] = carried(drawn(guidance))
    print(
        f"share of {IMAGES} portraits that carry what was asked for, {s.sampler} {s.steps} steps, on {hardware(device)}:\n"
    )
    print("| attribute | " + " | ".join(columns_of) + " |\n|" + "---|" * (1 + len(columns_of)))
    for k, name in enumerate(asked):
        print(f"| {name} | " + " | ".join(f"{values[k]:.1%}" for values in columns_of.values()) + " |")
    print("| mean | " + " | ".join(f"{values.mean():.1%}" for values in columns_of.values()) + " |")
    return net


if __name__ == "__main__":
    files = [a for a in sys.argv[1:] if a.endswith(".yaml")]
    judged = None
    for file in files:
        judged = judge(cli.parse([file, *(a for a in sys.argv[1:] if a not in files)])[0], judged)
