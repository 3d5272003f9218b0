"""Load initial weights: a file of this project, or a diffusers model in a folder or on the Hugging Face hub."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.unet import UNet
from models.vae import VAE
from utils.checkpoints import load_weights
from utils.diffusers_format import from_diffusers, unet_modules, unet_settings, vae_modules, vae_settings
from utils.errors import UserError
from utils.files import first_line

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# kind -> (our class, name of the diffusers class, function that converts the diffusers config to our settings, function
# that maps our module names to those of diffusers, possible subfolders of this network in a diffusers pipeline)
FORMATS = {
    "vae": (VAE, "AutoencoderKL", vae_settings, vae_modules, ("vae", "vqvae")),
    "unet": (UNet, "UNet2DModel", unet_settings, unet_modules, ("unet",)),
}
# Attention layers: name in files of old diffusers versions -> current name
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Pretrained:
    settings: dict  # constructor arguments of our VAE or UNet
    state: dict[str, Tensor]  # state dict of this network, float32
    metadata: dict = field(default_factory=dict)  # read from our own weights files; empty for diffusers models


def load_pretrained(kind: str, source: str, key: str) -> Pretrained:
    """Load weights of a VAE (kind "vae") or of a U-Net (kind "unet").

    source: a .safetensors file of this project; or, for a diffusers model, a folder or hub id. The folder or hub id may
    be that of the model or of a pipeline that contains the model.
    key: the setting whose value is `source`, for error messages
    """
    path = Path(source)
    if path.is_file():
        tensors, metadata = load_weights(path, kind, "the stage that writes it")
        state = {k: v for k, v in tensors.items() if not k.startswith("normalizer.")}
        return Pretrained(metadata["settings"], state, metadata)
    network, class_name, to_settings, to_modules, subfolders = FORMATS[kind]
    config_file, weights_file = _find_files(source, key, subfolders)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if config.get("_class_name") != class_name:
            raise ValueError(f"it is a {config.get('_class_name', 'model without a class name')}, not {class_name}")
        settings = to_settings(config)
        state = _read_weights(weights_file)
        with torch.device("meta"):
            keys = list(network(**settings).state_dict())
        return Pretrained(settings, from_diffusers(state, keys, to_modules(settings)))
    except Exception as error:  # many exception types: damaged files, missing keys, other architectures
        raise UserError(f"{key}: {source} cannot be used ({first_line(error)})") from None


def _find_files(source: str, key: str, subfolders: tuple[str, ...]) -> tuple[Path, Path]:
    """Return the paths of config.json and of the weights, in a local folder or downloaded from the hub."""
    if Path(source).is_dir():
        for folder in (Path(source), *(Path(source) / name for name in subfolders)):
            for name in WEIGHT_FILES:
                if (folder / "config.json").is_file() and (folder / name).is_file():
                    return folder / "config.json", folder / name
        raise UserError(f"{key}: {source} has no config.json with weights next to it ({' or '.join(WEIGHT_FILES)})")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{key}: {source} does not exist; name a file, a folder or a hub id (user/model)")
    return _download(source, key, subfolders)


def _download(repo: str, key: str, subfolders: tuple[str, ...]) -> tuple[Path, Path]:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # Not list_repo_files(): without internet it retries for 20 seconds.
        files = {file.rfilename for file in HfApi().model_info(repo).siblings}
        for prefix in ("", *(f"{name}/" for name in subfolders)):
            for name in WEIGHT_FILES:
                if {f"{prefix}config.json", f"{prefix}{name}"} <= files:
                    return tuple(Path(hf_hub_download(repo, f"{prefix}{file}")) for file in ("config.json", name))
        raise FileNotFoundError(f"no config.json with weights next to it ({' or '.join(WEIGHT_FILES)})")
    except Exception as error:  # many exception types: no network, no such repository, gated repository, full disk
        raise UserError(
            f"{key}: {repo} is not a local path and cannot be loaded from the Hugging Face hub ({first_line(error)})"
        ) from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    converted = {}
    for name, value in state.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[-2] in OLD_ATTENTION and "attentions" in parts:
            parts[-2] = OLD_ATTENTION[parts[-2]]
        converted[".".join(parts)] = value.float()
    return converted


def initialize(net: nn.Module, state: dict[str, Tensor], key: str) -> None:
    """Load a state dict that must have exactly the names and shapes of the network."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{key}: the weights do not fit the network ({str(error).splitlines()[-1].strip()[:160]})") from None
