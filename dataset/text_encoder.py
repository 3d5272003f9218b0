"""CLIP's text encoder (Radford et al. 2021), loaded with `transformers`."""

import torch
from torch import Tensor

from utils.checkpoints import fingerprint
from utils.errors import UserError
from utils.files import first_line


class TextEncoder:
    """Frozen CLIP text encoder. `model` is a name on the Hugging Face hub or a local folder."""

    def __init__(self, model: str, device: torch.device):
        from transformers import AutoTokenizer, CLIPTextModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # no warnings about unused image encoder weights
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.net = CLIPTextModel.from_pretrained(model).to(device).eval().requires_grad_(False)
        except Exception as error:  # no network, unknown model, missing file: many types from three libraries
            raise UserError(
                f"text.model: {model} cannot be loaded ({first_line(error)}). Without a network, put config.json, "
                f"model.safetensors, vocab.json and merges.txt of a CLIP model into a folder and set text.model=FOLDER; "
                f"text.encoder=words needs no download"
            ) from None
        self.model, self.dim, self.device = model, self.net.config.hidden_size, device
        self.max_length = self.net.config.max_position_embeddings  # 77 tokens
        # Versions of transformers differ in names and dtypes.
        weights = {name.removeprefix("text_model."): value.float() for name, value in self.net.state_dict().items()}
        self.fingerprint = fingerprint(weights)
        self.num_truncated = 0  # captions so far

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Return (L_i, dim) float32 on the CPU per caption, with start and end token, truncated to max_length."""
        token_ids = self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        self.num_truncated += sum(len(ids) > self.max_length for ids in token_ids)
        batch = self.tokenizer(captions, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        batch = batch.to(self.device)
        states = self.net(**batch).last_hidden_state.float()  # (B, L, dim)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(states.cpu(), lengths)]
