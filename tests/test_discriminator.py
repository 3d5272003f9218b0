"""Adversarial loss: closed forms, and training of the VAE and the discriminator side by side."""

import json

import pytest
import torch
from conftest import Experiment
from safetensors.torch import load_file
from torch import nn

from models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from training.trainer import Trainer

ADVERSARIAL = (
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


def test_patches_have_70_pixels():
    """The receptive field of a logit is the region of the image with a nonzero gradient."""
    torch.manual_seed(0)
    net = PatchDiscriminator(8)
    for module in net.modules():  # GroupNorm would extend the receptive field to the whole image
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = net(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    field = x.grad.abs().sum(dim=1)[0] > 0
    assert int(field.any(dim=0).sum()) == 70 and int(field.any(dim=1).sum()) == 70


def test_adaptive_weight_balances_the_gradients():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight = adaptive_weight(3 * layer.sum(), 0.5 * layer.sum(), layer)
    assert float(weight) == pytest.approx(6.0, rel=1e-3) and not weight.requires_grad
    assert float(adaptive_weight(layer.sum(), 0.0 * layer.sum(), layer)) == pytest.approx(1e4)  # bounded


def has_gradient(net: nn.Module) -> bool:
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def read_metrics(experiment) -> list[dict]:
    return [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]


def test_backward_passes_leave_no_gradients_in_the_other_network(experiment, monkeypatch):
    backward, backward_discriminator, calls = Trainer.backward, Trainer.backward_discriminator, []

    def checked_backward(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        calls.append("vae")
        assert all(p.grad is None for p in self.discriminator.parameters())
        assert has_gradient(self.net)
        self.vae_grads = [p.grad.clone() for p in self.net.parameters() if p.grad is not None]

    def checked_backward_discriminator(self, *args, **kwargs):
        backward_discriminator(self, *args, **kwargs)
        calls.append("discriminator")
        vae_grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        assert len(vae_grads) == len(self.vae_grads) and all(map(torch.equal, vae_grads, self.vae_grads))
        assert all(p.grad is not None for p in self.discriminator.parameters())

    monkeypatch.setattr(Trainer, "backward", checked_backward)
    monkeypatch.setattr(Trainer, "backward_discriminator", checked_backward_discriminator)
    assert experiment.run("train_vae", *ADVERSARIAL) == 0
    assert calls == ["vae", "vae"] + ["vae", "discriminator"] * 3  # adversarial from step 2 on
    assert {"train/g_loss", "train/d_loss", "train/adaptive_weight"} <= set().union(*read_metrics(experiment))


def test_metrics_are_averaged_over_the_steps_that_have_them(experiment, monkeypatch):
    """The discriminator starts in the last step before a log line: the logged loss is that step's, not a fraction of it."""
    losses, backward_discriminator = [], Trainer.backward_discriminator

    def recorded(self, loss, **metrics):
        losses.append(float(loss.detach().mean()))
        backward_discriminator(self, loss, **metrics)

    monkeypatch.setattr(Trainer, "backward_discriminator", recorded)
    assert experiment.run("train_vae", *ADVERSARIAL, "vae.adversarial.start=4", "vae.log_every=5") == 0
    logged = [line["train/d_loss"] for line in read_metrics(experiment) if "train/d_loss" in line]
    assert len(losses) == 1 and logged == pytest.approx(losses)


def test_resume_restores_the_discriminator(experiment, tmp_path):
    (tmp_path / "other").mkdir()
    resumed = Experiment(tmp_path / "other")
    assert experiment.run("train_vae", *ADVERSARIAL) == 0
    for steps in (3, 5):
        assert resumed.run("train_vae", *ADVERSARIAL[:-1], f"vae.steps={steps}") == 0
    a, b = (load_file(e.run_dir / "vae" / "vae.safetensors") for e in (experiment, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
