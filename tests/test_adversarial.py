"""The adversarial term: losses by hand, and that neither network's step leaves a gradient in the other."""

import json

import pytest
import torch
from conftest import Experiment
from safetensors.torch import load_file
from torch import nn

from lab import run
from models.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss

ON = (
    "vae.adversarial.weight=0.5",
    "vae.adversarial.start=2",
    "vae.adversarial.width=8",
    "data.image_size=32",
    "vae.steps=5",
)


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]).view(1, 1, 1, 2), torch.tensor([-3.0, 0.5]).view(1, 1, 1, 2)
    assert float(discriminator_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5) + (0 + 1.5)) / 2)
    assert float(generator_loss(fake)) == pytest.approx(1.25)


def test_a_patch_is_70_pixels():
    """The receptive field of one logit: where an image's gradient is not zero."""
    torch.manual_seed(0)
    net = PatchDiscriminator(8)
    for module in net.modules():  # GroupNorm sees the whole image; without it the convolutions' field is left
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    touched = x.grad.abs().sum(dim=1)[0] > 0
    assert int(touched.any(dim=0).sum()) == 70 and int(touched.any(dim=1).sum()) == 70


def test_adaptive_weight_evens_the_gradients():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight = adaptive_weight(3 * layer.sum(), 0.5 * layer.sum(), layer)
    assert float(weight) == pytest.approx(6.0, rel=1e-3) and not weight.requires_grad
    assert float(adaptive_weight(layer.sum(), 0.0 * layer.sum(), layer)) == pytest.approx(1e4)  # bounded


def test_neither_step_leaves_a_gradient_in_the_other(experiment, monkeypatch):
    accumulate, companion, seen = run.Run.accumulate, run.Run.accumulate_companion, []

    def watched(self, *args, **kwargs):
        accumulate(self, *args, **kwargs)
        seen.append("vae")
        assert all(p.grad is None for p in self.companion.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in self.net.parameters())
        self.before = [p.grad.clone() for p in self.net.parameters() if p.grad is not None]

    def watched_companion(self, *args, **kwargs):
        companion(self, *args, **kwargs)
        seen.append("judge")
        assert all(
            torch.equal(a, b) for a, b in zip(self.before, [p.grad for p in self.net.parameters() if p.grad is not None])
        )
        assert all(p.grad is not None for p in self.companion.parameters())

    monkeypatch.setattr(run.Run, "accumulate", watched)
    monkeypatch.setattr(run.Run, "accumulate_companion", watched_companion)
    assert experiment.run("train_vae", *ON) == 0
    assert seen == ["vae", "vae"] + ["vae", "judge"] * 3  # from step 2 on
    lines = [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert {"train/fooling", "train/discriminator", "train/adaptive_weight"} <= set().union(*lines)


def test_figures_of_a_part_of_the_steps_are_their_own_mean(experiment, monkeypatch):
    """The discriminator begins in the last of a report's steps: its loss is that step's, not a share of it."""
    seen, companion = [], run.Run.accumulate_companion
    monkeypatch.setattr(
        run.Run,
        "accumulate_companion",
        lambda self, loss, **figures: seen.append(float(loss.detach().mean())) or companion(self, loss, **figures),
    )
    assert experiment.run("train_vae", *ON, "vae.adversarial.start=4", "vae.log_every=5") == 0
    lines = [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/discriminator"] for line in lines if "train/discriminator" in line] == pytest.approx(seen) and len(
        seen
    ) == 1


def test_resuming_takes_the_discriminator_along(experiment, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    twice = Experiment(other)
    assert experiment.run("train_vae", *ON) == 0
    for steps in (3, 5):
        assert twice.run("train_vae", *ON[:-1], f"vae.steps={steps}") == 0
    one, two = (load_file(e.run_dir / "vae" / "vae.safetensors") for e in (experiment, twice))
    assert all(torch.equal(one[k], two[k]) for k in one)
