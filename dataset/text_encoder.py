"""Frozen text encoders of the `transformers` library: CLIP (Radford et al. 2021), T5, BERT and others."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoints import fingerprint
from utils.errors import UserError
from utils.files import first_line

DEFAULT_MAX_LENGTH = 512  # tokens, for models without position embeddings (T5)
POOLER = "pooler."  # prefix of the pooling layer's tensors, which are not used here and often missing in weights files


class TextEncoder:
    """Frozen text encoder.

    Args:
        model: name on the Hugging Face hub, local folder, or PACKAGE:FOLDER for a folder inside an installed Python package.
    """

    def __init__(self, model: str, device: torch.device):
        from transformers.utils import logging

        logging.set_verbosity_error()  # hides warnings about the unused weights of CLIP's image encoder
        logging.disable_progress_bar()
        try:
            self.tokenizer, self.net, missing = _load(_resolve(model))
        except Exception as error:  # no network, unknown model, missing file: many types from three libraries
            raise UserError(
                f"text.model: {model} cannot be loaded ({first_line(error)}). Without a network, put config.json, "
                f"model.safetensors and the tokenizer's files of a text encoder into a folder and set text.model=FOLDER; "
                f"text.encoder=words needs no download"
            ) from None
        if missing:
            raise UserError(f"text.model: the weights file of {model} lacks {len(missing)} tensors, such as {missing[0]}")
        self.net = self.net.to(device).eval().requires_grad_(False)
        config = self.net.config
        self.model, self.dim, self.device = model, config.hidden_size, device
        limits = [self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH]
        self.max_length = min(limits)
        # CLIP's attention is causal, so only its last token depends on the whole caption.
        self.pooling = "last" if config.model_type.startswith("clip") else "mean"
        # The fingerprint ignores what differs between versions of transformers (names, dtypes), and the pooler, whose
        # weights are random if the file lacks them.
        state = {name.removeprefix("text_model."): value.float() for name, value in self.net.state_dict().items()}
        self.fingerprint = fingerprint({name: value for name, value in state.items() if not name.startswith(POOLER)})
        self.num_truncated = 0  # captions truncated so far
        if not len(self.encode([""])[0]):
            raise UserError(f"text.model: {model} encodes the empty caption as zero tokens; guidance needs at least one")

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Return the token embeddings (L_i, dim) of each caption, float32 on the CPU.

        The L_i tokens include start and end tokens, and are truncated to max_length.
        """
        token_ids = self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        self.num_truncated += sum(len(ids) > self.max_length for ids in token_ids)
        batch = self.tokenizer(
            captions, padding=True, padding_side="right", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        states = self.net(**batch).last_hidden_state.float()  # (B, L, dim)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(states.cpu(), lengths)]


def _resolve(model: str) -> str:
    """Replace PACKAGE:FOLDER by the path of the folder; return other names unchanged."""
    package, _, folder = model.partition(":")
    if not folder or not package.isidentifier():
        return model
    spec = find_spec(package)
    if spec is None:
        raise ValueError(f"the Python package {package} is not installed")
    return str(Path(spec.origin).parent / folder)


def _load(model: str) -> tuple:
    """Return the tokenizer, the network and the names of tensors that the weights file lacks."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = AutoConfig.from_pretrained(model)
    if config.model_type == "clip":  # the file also holds the image encoder, which AutoModel would load
        auto_class = CLIPTextModel
    else:
        auto_class = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    net, info = auto_class.from_pretrained(model, output_loading_info=True)
    if config.is_encoder_decoder and auto_class is AutoModel:  # for example BART
        net = net.get_encoder()
    if not isinstance(net, transformers.PreTrainedModel) or not hasattr(net.config, "hidden_size"):
        raise ValueError(f"a model of type {config.model_type} is not a text encoder")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # any token works, because padding is masked
    missing = sorted(name for name in info["missing_keys"] if POOLER not in name)
    return tokenizer, net, missing
