"""Our networks against diffusers' with the same random weights, in both directions (utils/diffusers_format.py)."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel

from models.layers import num_norm_groups
from models.unet import UNet
from models.vae import VAE
from utils.diffusers_format import (
    from_diffusers,
    to_diffusers,
    unet_config,
    unet_modules,
    unet_settings,
    vae_config,
    vae_modules,
    vae_settings,
)

CLASSES = {"kind": "labels", "names": {"class": [str(i) for i in range(10)]}}
UNETS = [
    dict(channels=[32], size=16, num_res_blocks=1, attn_resolutions=[]),
    dict(channels=[48], size=8, num_res_blocks=2, attn_resolutions=[8]),
    dict(channels=[32, 64], size=16, num_res_blocks=2, attn_resolutions=[8], head_channels=16),
    dict(channels=[32, 48, 64], size=32, num_res_blocks=1, attn_resolutions=[16, 8], head_channels=16),
    dict(channels=[64, 48, 32], size=16, num_res_blocks=1, attn_resolutions=[16, 4], head_channels=16),
    dict(channels=[48, 64], size=16, num_res_blocks=1, attn_resolutions=[], conditioning=CLASSES),
    dict(channels=[32, 64], size=8, num_res_blocks=2, attn_resolutions=[8, 4], head_channels=32, conditioning=CLASSES),
]
VAES = [
    dict(channels=[32], num_res_blocks=1, attention=True),
    dict(channels=[32, 64], num_res_blocks=2),
    dict(channels=[32, 48, 64], num_res_blocks=1, attention=True, quant_conv=True),
    dict(channels=[64, 48, 32], num_res_blocks=1, attention=True),
    dict(channels=[16, 32, 64, 64], num_res_blocks=1),
]


def randomize(net: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, also in zero-initialized layers, with outputs of std about 1."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (1.3 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.6))
    return net.eval()


def unet_pair(settings: dict) -> tuple[UNet, UNet2DModel]:
    torch.manual_seed(0)
    ours = randomize(UNet(in_channels=4, **settings))
    reference = UNet2DModel(**unet_config(ours.settings)).eval()
    reference.load_state_dict(to_diffusers(ours.state_dict(), unet_modules(ours.settings)))
    return ours, reference


def vae_pair(settings: dict) -> tuple[VAE, AutoencoderKL]:
    torch.manual_seed(0)
    ours = randomize(VAE(latent_channels=4, **settings))
    reference = AutoencoderKL(**vae_config(ours.settings, image_size=32)).eval()
    reference.load_state_dict(to_diffusers(ours.state_dict(), vae_modules(ours.settings)))
    return ours, reference


@torch.no_grad()
@pytest.mark.parametrize("settings", UNETS)
def test_unet_equals_unet2dmodel(settings):
    ours, reference = unet_pair(settings)
    z, t, labels = (
        torch.randn(3, 4, settings["size"], settings["size"]),
        torch.tensor([0, 500, 999]),
        torch.tensor([3, 0, 10]),
    )
    conditional = "conditioning" in settings
    expected = reference(z, t, class_labels=labels if conditional else None).sample
    output = ours(z, t, (labels[:, None],) if conditional else ())
    assert float(expected.std()) > 0.2
    assert float((output - expected).abs().max()) < 1e-5 * max(1, float(expected.std()))


@torch.no_grad()
@pytest.mark.parametrize("settings", VAES)
def test_vae_equals_autoencoderkl(settings):
    ours, reference = vae_pair(settings)
    images = torch.randn(2, 3, 32, 32)
    posterior, expected = ours.encode(images), reference.encode(images).latent_dist
    decoded = reference.decode(expected.mean).sample
    assert float(expected.mean.std()) > 0.1 and float(decoded.std()) > 0.1
    for a, b in (
        (posterior.mean, expected.mean),
        (posterior.logvar, expected.logvar),
        (ours.decode(expected.mean), decoded),
    ):
        assert float((a - b).abs().max()) < 1e-5 * max(1, float(b.std()))


@pytest.mark.parametrize("settings", UNETS)
def test_unet_round_trip(settings):
    ours, reference = unet_pair(settings)
    back = unet_settings(dict(reference.config))
    rebuilt = UNet(**back)
    rebuilt.load_state_dict(from_diffusers(reference.state_dict(), list(rebuilt.state_dict()), unet_modules(back)))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), rebuilt.parameters(), strict=True))
    assert unet_config(back) == unet_config(ours.settings)


@pytest.mark.parametrize("settings", VAES)
def test_vae_round_trip(settings):
    ours, reference = vae_pair(settings)
    assert vae_settings(dict(reference.config)) == ours.settings
    state = from_diffusers(reference.state_dict(), list(ours.state_dict()), vae_modules(ours.settings))
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())


def test_published_vae_has_our_shapes():
    """Stable Diffusion's VAE: 83,653,771 parameters with quant convolutions of 92 more, 32 groups, one attention head."""
    settings = dict(channels=[128, 256, 512, 512], num_res_blocks=2, latent_channels=4, attention=True, quant_conv=True)
    with torch.device("meta"):
        ours = VAE(**settings)
        reference = AutoencoderKL(**vae_config(ours.settings, 256))
    assert sum(p.numel() for p in ours.parameters()) == 83_653_771 + 92
    assert ours.downsampling == 8
    expected = {name: value.shape for name, value in reference.state_dict().items()}
    assert {k: v.shape for k, v in to_diffusers(ours.state_dict(), vae_modules(ours.settings)).items()} == expected


@pytest.mark.parametrize(
    "channels, groups",
    [([128, 256, 512, 512], 32), ([64, 128, 256], 16), ([96, 192], 24), ([48, 64, 128], 8), ([8, 16], 2), ([4], 1)],
)
def test_one_number_of_groups(channels, groups):
    assert num_norm_groups(channels) == groups


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bottleneck="transformer"), "bottleneck=transformer"),
        (
            dict(conditioning={"kind": "words", "vocabulary": ["a"], "width": 8}, cross_attn_resolutions=[8]),
            "condition=text",
        ),
        (dict(conditioning={"kind": "labels", "names": {"a": ["0"], "b": ["0"]}}), "one label per image"),
        (dict(channels=[24, 48], head_channels=16, attn_resolutions=[8, 4]), "head_channels=16"),
    ],
)
def test_unets_without_a_counterpart_are_refused(change, message):
    settings = dict(channels=[32, 64], size=8, num_res_blocks=1, attn_resolutions=[4]) | change
    with pytest.raises(ValueError, match=message):
        unet_config(UNet(in_channels=4, **settings).settings)


@pytest.mark.parametrize("change, message", [(dict(patch_size=2), "patch_size=2"), (dict(output_activation="tanh"), "tanh")])
def test_vaes_without_a_counterpart_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vae_config(VAE(channels=[8], num_res_blocks=1, latent_channels=4, **change).settings, 32)


def test_imports_without_a_counterpart_are_refused():
    config = dict(UNet2DModel(**unet_config(UNet(in_channels=4, **UNETS[2]).settings)).config)
    changes = dict(attention_head_dim=24, norm_num_groups=4, freq_shift=1, downsample_padding=0)
    for name, value in (changes | dict(act_fn="gelu", mid_block_scale_factor=2)).items():
        with pytest.raises(ValueError, match=name):
            unet_settings(config | {name: value})
    assert unet_settings(config | {"act_fn": "swish"}) == unet_settings(config)  # two names of the same function
    for name in ("norm_eps", "norm_num_groups"):  # diffusers' defaults are 1e-5 and 32
        with pytest.raises(ValueError, match=name):
            unet_settings({key: value for key, value in config.items() if key != name})
    state = dict(unet_pair(UNETS[2])[1].state_dict())
    keys, modules = (
        list(UNet(in_channels=4, **UNETS[2]).state_dict()),
        unet_modules(UNet(in_channels=4, **UNETS[2]).settings),
    )
    with pytest.raises(ValueError, match="conv_in.weight .missing."):
        from_diffusers({k: v for k, v in state.items() if k != "conv_in.weight"}, keys, modules)
    with pytest.raises(ValueError, match="extra .unexpected."):
        from_diffusers(state | {"extra": torch.zeros(1)}, keys, modules)
