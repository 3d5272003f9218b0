"""Convert our UNet to and from diffusers' UNet2DModel, and our VAE to and from AutoencoderKL: arguments and state dicts.

Each network computes the same function as its counterpart in diffusers. So conversion only renames tensors, and joins or
splits q, k and v, which are one tensor here. Functions raise ValueError for architectures without a counterpart.
"""

from typing import Sequence

import torch
from torch import Tensor

from models.layers import height_width, num_heads, num_norm_groups

# Submodules of our layers (models/layers.py) -> their names in diffusers, if different.
SUBMODULES = {"modulation": "time_emb_proj", "skip": "conv_shortcut", "norm": "group_norm", "out": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")


# Constructor arguments


def unet_config(settings: dict) -> dict:
    """UNet.settings -> arguments of UNet2DModel."""
    if settings["bottleneck"] != "residual":
        raise ValueError(f"diffusion.bottleneck={settings['bottleneck']} has no counterpart in diffusers' UNet2DModel")
    conditioning = settings["conditioning"]
    if conditioning and conditioning["kind"] != "labels":
        raise ValueError("diffusion.condition=text has no counterpart in diffusers' UNet2DModel")
    if conditioning and len(conditioning["names"]) > 1:
        raise ValueError(
            f"diffusers' UNet2DModel takes one label per image (this model has {', '.join(conditioning['names'])})"
        )
    channels, size = settings["channels"], max(settings["size"])
    has_attention = [size >> level in settings["attn_resolutions"] for level in range(len(channels))]
    groups = num_norm_groups(channels)
    return dict(
        sample_size=_sample_size(settings["size"]),
        in_channels=settings["in_channels"],
        out_channels=settings["in_channels"],
        block_out_channels=tuple(channels),
        layers_per_block=settings["num_res_blocks"],
        dropout=settings["dropout"],
        down_block_types=tuple("AttnDownBlock2D" if attn else "DownBlock2D" for attn in has_attention),
        up_block_types=tuple("AttnUpBlock2D" if attn else "UpBlock2D" for attn in reversed(has_attention)),
        attention_head_dim=_head_dim(settings, has_attention),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        norm_eps=1e-6,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=len(next(iter(conditioning["names"].values()))) + 1 if conditioning else None,
    )


def _sample_size(size: int | Sequence[int]) -> int | list[int]:
    """Return one number for a square, as diffusers' LDMPipeline requires, else [height, width]."""
    height, width = height_width(size)
    return height if height == width else [height, width]


def _head_dim(settings: dict, has_attention: list[bool]) -> int | None:
    """Return the channels per attention head; None: every layer has one head, and the heads differ in size.

    diffusers takes a single number for all levels. Raises ValueError if the network does not fit.
    """
    channels, head_channels = settings["channels"], settings["head_channels"]
    attended = [ch for ch, attn in zip(channels, has_attention) if attn] + [channels[-1]]
    heads = [num_heads(ch, head_channels) for ch in attended]
    dims = {ch // n for ch, n in zip(attended, heads)}
    if len(dims) == 1:
        return dims.pop()
    if set(heads) == {1}:
        return None
    raise ValueError(
        f"diffusion.head_channels={head_channels} gives attention heads of {' and '.join(map(str, sorted(dims)))} channels, "
        f"but diffusers allows only one size: choose a number that divides {', '.join(map(str, sorted(set(attended))))}"
    )


def unet_settings(config: dict) -> dict:
    """Translate the config.json of diffusers' UNet2DModel to UNet.settings.

    Classes are named 0, 1, …; the last class is the null label.
    """
    expected = dict(
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="positional",
        flip_sin_to_cos=True,
        freq_shift=0,
        norm_eps=1e-6,
        downsample_padding=1,
        mid_block_scale_factor=1,
        center_input_sample=False,
        class_embed_type=None,
        add_attention=True,
        mid_block_type="UNetMidBlock2D",
    )
    channels = list(config["block_out_channels"])
    groups, size = num_norm_groups(channels), height_width(config["sample_size"])
    expected |= dict(norm_num_groups=groups, attn_norm_num_groups=groups, out_channels=config["in_channels"])
    # Defaults of diffusers that differ from our values.
    _require({"norm_eps": 1e-5, "norm_num_groups": 32} | config, expected)
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ValueError(f"act_fn must be silu or swish (got {config['act_fn']})")
    for block in (*config["down_block_types"], *config["up_block_types"]):
        if block not in ("DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"):
            raise ValueError(f"block type {block} has no counterpart in nanoLDM's UNet")
    has_attention = [block == "AttnDownBlock2D" for block in config["down_block_types"]]
    num_classes = config.get("num_class_embeds")
    names = {"class": [str(i) for i in range(num_classes - 1)]} if num_classes else None
    settings = dict(
        in_channels=config["in_channels"],
        size=size,
        channels=channels,
        num_res_blocks=config["layers_per_block"],
        attn_resolutions=[max(size) >> level for level, attn in enumerate(has_attention) if attn],
        head_channels=config["attention_head_dim"] or max(channels),
        dropout=config["dropout"],
        conditioning={"kind": "labels", "names": names} if names else None,
        cross_attn_resolutions=[],
        bottleneck="residual",
        bottleneck_blocks=4,
    )
    if _head_dim(settings, has_attention) != config["attention_head_dim"]:
        raise ValueError(f"attention_head_dim {config['attention_head_dim']} has no counterpart in nanoLDM's UNet")
    return settings


def vae_config(settings: dict, image_size: int | Sequence[int], scaling_factor: float = 1.0) -> dict:
    """VAE.settings -> arguments of AutoencoderKL."""
    if settings["patch_size"] != 1:
        raise ValueError(f"vae.patch_size={settings['patch_size']} has no counterpart in diffusers' AutoencoderKL")
    if settings["output_activation"] != "none":
        raise ValueError(
            f"vae.output_activation={settings['output_activation']} has no counterpart in diffusers' AutoencoderKL"
        )
    channels = settings["channels"]
    return dict(
        in_channels=settings["in_channels"],
        out_channels=settings["in_channels"],
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=settings["num_res_blocks"],
        latent_channels=settings["latent_channels"],
        norm_num_groups=num_norm_groups(channels),
        sample_size=_sample_size(image_size),
        scaling_factor=scaling_factor,
        use_quant_conv=settings["quant_conv"],
        use_post_quant_conv=settings["quant_conv"],
        mid_block_add_attention=settings["attention"],
        force_upcast=False,
    )


def vae_settings(config: dict) -> dict:
    """Translate the config.json of diffusers' AutoencoderKL to VAE.settings."""
    channels = list(config["block_out_channels"])
    in_channels, quant_conv = config.get("in_channels", 3), config.get("use_quant_conv", True)
    _require(
        config,
        dict(
            out_channels=in_channels,
            act_fn="silu",
            norm_num_groups=num_norm_groups(channels),
            use_post_quant_conv=quant_conv,
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
        ),
    )
    return dict(
        in_channels=in_channels,
        channels=channels,
        num_res_blocks=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        attention=config.get("mid_block_add_attention", True),
        patch_size=1,
        output_activation="none",
        quant_conv=quant_conv,
    )


def _require(config: dict, expected: dict) -> None:
    """Raise ValueError if config has a value other than the expected one. Missing keys are accepted."""
    for name, value in expected.items():
        actual = config.get(name, value)
        actual = list(actual) if isinstance(actual, tuple) else actual
        if actual != value:
            raise ValueError(f"{name} must be {value} (got {actual})")


# State dicts


def unet_modules(settings: dict) -> dict[str, str]:
    """Map the names of UNet's modules to those of UNet2DModel."""
    blocks, levels, size = settings["num_res_blocks"], len(settings["channels"]), max(settings["size"])
    has_attention = [size >> level in settings["attn_resolutions"] for level in range(levels)]
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "conditioner.table": "class_embedding",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "middle.0": "mid_block.resnets.0",
        "middle.1": "mid_block.attentions.0",
        "middle.2": "mid_block.resnets.1",
    }
    for level in range(levels):
        first = level * (blocks + 1)
        if level > 0:
            names[f"down.{first - 1}.0"] = f"down_blocks.{level - 1}.downsamplers.0"
        for j in range(blocks):
            names[f"down.{first + j}.0"] = f"down_blocks.{level}.resnets.{j}"
            if has_attention[level]:
                names[f"down.{first + j}.1"] = f"down_blocks.{level}.attentions.{j}"
    for i, level in enumerate(reversed(range(levels))):
        first = i * (blocks + 1)
        for j in range(blocks + 1):
            names[f"up.{first + j}.0"] = f"up_blocks.{i}.resnets.{j}"
            if has_attention[level]:
                names[f"up.{first + j}.1"] = f"up_blocks.{i}.attentions.{j}"
        if level > 0:
            names[f"up.{first + blocks}.{1 + has_attention[level]}"] = f"up_blocks.{i}.upsamplers.0"
    return names


def vae_modules(settings: dict) -> dict[str, str]:
    """Map the names of VAE's modules to those of AutoencoderKL."""
    blocks, levels, attention = settings["num_res_blocks"], len(settings["channels"]), settings["attention"]
    names = {"encoder.1": "encoder.conv_in", "quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for level in range(levels):
        first = 2 + level * (blocks + 1)
        if level > 0:
            names[f"encoder.{first - 1}"] = f"encoder.down_blocks.{level - 1}.downsamplers.0"
        names |= {f"encoder.{first + j}": f"encoder.down_blocks.{level}.resnets.{j}" for j in range(blocks)}
    end = 1 + levels * (blocks + 1)
    names |= _middle_modules("encoder", end, attention)
    end += 2 + attention
    names |= {f"encoder.{end}": "encoder.conv_norm_out", f"encoder.{end + 2}": "encoder.conv_out"}

    names |= {"decoder.0": "decoder.conv_in", **_middle_modules("decoder", 1, attention)}
    for i in range(levels):
        first = 3 + attention + i * (blocks + 2)
        names |= {f"decoder.{first + j}": f"decoder.up_blocks.{i}.resnets.{j}" for j in range(blocks + 1)}
        if i < levels - 1:
            names[f"decoder.{first + blocks + 1}"] = f"decoder.up_blocks.{i}.upsamplers.0"
    end = 3 + attention + levels * (blocks + 2) - 1
    names |= {f"decoder.{end}": "decoder.conv_norm_out", f"decoder.{end + 2}": "decoder.conv_out"}
    return names


def _middle_modules(part: str, first: int, attention: bool) -> dict[str, str]:
    names = {f"{part}.{first}": f"{part}.mid_block.resnets.0"}
    if attention:
        names[f"{part}.{first + 1}"] = f"{part}.mid_block.attentions.0"
    names[f"{part}.{first + 1 + attention}"] = f"{part}.mid_block.resnets.1"
    return names


def to_diffusers(state: dict[str, Tensor], modules: dict[str, str]) -> dict[str, Tensor]:
    """State dict of UNet or VAE -> state dict of its counterpart. `modules` is unet_modules() or vae_modules()."""
    converted = {}
    for key, value in state.items():
        names = _names(key, modules)
        converted |= zip(names, value.chunk(len(names)))
    return converted


def from_diffusers(state: dict[str, Tensor], keys: list[str], modules: dict[str, str]) -> dict[str, Tensor]:
    """Inverse of to_diffusers(). `keys` are those of our state dict. Raises ValueError for missing or unexpected tensors."""
    names = {key: _names(key, modules) for key in keys}
    wanted = {name for group in names.values() for name in group}
    different = sorted(wanted ^ state.keys())
    if different:
        reason = "missing" if different[0] in wanted else "unexpected"
        raise ValueError(f"{len(different)} tensors do not match, for example {different[0]} ({reason})")
    return {
        key: torch.cat([state[name] for name in group]) if len(group) > 1 else state[group[0]]
        for key, group in names.items()
    }


def _names(key: str, modules: dict[str, str]) -> list[str]:
    """Names in diffusers for the tensor `key` of our network: three names (q, k, v) for qkv, else one."""
    prefix = next(name for name in modules if key.startswith(name + "."))
    *submodule, tensor = key.removeprefix(prefix + ".").split(".")
    if submodule == ["qkv"]:
        return [f"{modules[prefix]}.{part}.{tensor}" for part in QKV]
    return [".".join([modules[prefix], *(SUBMODULES.get(name, name) for name in submodule), tensor])]
