"""CLIP's text encoder (Radford et al. 2021) through `transformers`: captions -> the embeddings of their tokens."""

import torch
from torch import Tensor

from lab.artifacts import fingerprint, first_line
from lab.errors import UserError


class ClipText:
    """A frozen text encoder, by its name on the Hugging Face hub or a local folder. Raises UserError where it cannot be had."""

    def __init__(self, model: str, device: torch.device):
        from transformers import AutoTokenizer, CLIPTextModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # it reports the weights of the image half, which are not wanted, one by one
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.net = CLIPTextModel.from_pretrained(model).to(device).eval().requires_grad_(False)
        except Exception as error:  # no network, no such model, a folder that lacks a file: many types from three libraries
            raise UserError(
                f"text.model: {model} cannot be loaded ({first_line(error)}). Without a network, put config.json, model.safetensors, "
                f"vocab.json and merges.txt of a CLIP model into a folder and name it with text.model=FOLDER; text.encoder=words needs none"
            ) from None
        self.model, self.width, self.device = model, self.net.config.hidden_size, device
        self.longest = self.net.config.max_position_embeddings  # 77 tokens
        # What it is, wherever it lies; versions of transformers name and store the same weights in several ways.
        weights = {name.removeprefix("text_model."): value.float() for name, value in self.net.state_dict().items()}
        self.fingerprint = fingerprint(weights)
        self.cut = 0  # captions so far that were longer

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """(L_i, width) float32 for each, from its start token to its end token: no padding. What is longer than `longest` is cut."""
        self.cut += sum(
            len(ids) > self.longest for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        )
        batch = self.tokenizer(captions, padding=True, truncation=True, max_length=self.longest, return_tensors="pt").to(
            self.device
        )
        states = self.net(**batch).last_hidden_state.float()  # (B, L, width)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [row[:length] for row, length in zip(states.cpu(), lengths)]
