"""Stage 2 of 4: VAE -> runs/<name>/encodings.pt.

Encode all training and validation images to their posterior means, and with data.flip also the mirrored training images.
Fit the normalizer to the training latents. Store latents, normalizer, labels, captions, fingerprints and, with
text.encoder=pretrained, caption embeddings. Does nothing if encodings.pt is up to date. Run the same command again to
continue after an interruption.
"""

from utils import cli

if __name__ == "__main__":
    cli.handle_help(__doc__)

import shutil
from itertools import count
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from config import Config
from dataset import TRAIN, VAL
from dataset.chunks import EncodeChunk, chunk_folder, encode_in_chunks, join_chunks, remove_other_chunks
from dataset.encodings import CaptionEmbeddings, LatentDataset
from dataset.loader import BatchLoader
from dataset.text_encoder import TextEncoder
from models.normalizer import Normalizer
from models.vae import VAE
from pipeline.stage_files import encodings_path, load_images_for, load_vae, note_if_unfinished, vae_path
from utils import distributed
from utils.checkpoints import fingerprint
from utils.device import autocast, compile_networks, pick_device, pick_precision
from utils.errors import UserError
from utils.files import require_space
from utils.images import to_float
from utils.locks import lock_folder

TOKENS_PER_CAPTION = 15  # typical length, to estimate the disk space for caption embeddings


def encode(config: Config, dry_run: bool) -> None:
    cfg, device = config.encodings, pick_device(config.device)
    dtype, path = pick_precision(config.precision, device), encodings_path(config)
    vae, metadata = load_vae(config, device)
    images = load_images_for(config, metadata, wait=False)
    note_if_unfinished(vae_path(config), metadata, "train_vae.py")
    rows = {split: images.rows(split) for split in (TRAIN, VAL)}
    captions = {split: [images.captions[i] for i in rows[split]] if images.captions is not None else None for split in rows}
    labels = {split: torch.from_numpy(images.labels[rows[split]]) if images.labels is not None else None for split in rows}
    encoder, texts = None, []
    if config.text.encoder == "pretrained" and images.captions is not None:
        encoder = TextEncoder(config.text.model, device)
        # The last text is the empty caption, whose embedding is the null condition.
        texts = [text for split in rows for image_captions in captions[split] for text in image_captions] + [""]
    result = dict(
        labels=labels[TRAIN],
        val_labels=labels[VAL],
        label_names=images.label_names,
        captions=captions[TRAIN],
        val_captions=captions[VAL],
        vae_fingerprint=fingerprint(vae.state_dict()),
        data_fingerprint=images.fingerprint,
    )
    height, width = (side // vae.downsampling for side in config.data.size)
    num_encodings = len(rows[TRAIN]) * (2 if config.data.flip else 1) + len(rows[VAL])
    num_bytes = num_encodings * height * width * vae.latent_channels * 2
    mirrored = " and their mirror images" if config.data.flip else ""
    print("stage 2 of 4: encode the images")
    print(
        f"encodings: {len(rows[TRAIN]):,} training images{mirrored}, {len(rows[VAL]):,} validation images, "
        f"{height}x{width}x{vae.latent_channels} each, on {device} in {str(dtype)[6:]}"
    )
    print(f"files: {path} ({num_bytes / 1e6:,.0f} MB)")
    up_to_date = is_up_to_date(path, result, encoder, config)
    distributed.require_same(up_to_date, f"whether {path} is up to date", "all processes need the same files and settings")
    if up_to_date:
        print(f"{path} is up to date")
        return
    if encoder:
        caption_bytes = len(texts) * TOKENS_PER_CAPTION * encoder.dim * 2
        num_bytes += caption_bytes
        print(f"captions: {len(texts) - 1:,}, embedded by {encoder.model}, about {caption_bytes / 1e6:,.0f} MB")
    inputs = f"{result['vae_fingerprint']}{images.fingerprint}{cfg.dtype}{dtype}{encoder and encoder.fingerprint}{texts}"
    scratch = chunk_folder(config.run_dir, inputs)
    distributed.require_same(scratch.name, "the folder for encodings", "all processes need the same files and settings")
    num_written = sum(file.stat().st_size for file in scratch.glob("*.pt"))  # by an interrupted run
    require_space(config.run_dir, 3 * num_bytes - num_written)  # chunks, joined chunks and the final file exist together
    if dry_run:
        return

    lock_folder(config.run_dir)
    remove_other_chunks(scratch)
    if config.compile is True:  # "auto" does not compile here: encoding ends before compilation pays off
        compile_networks(True, device, vae.encoder)
    loader = BatchLoader([torch.from_numpy(images.pixels)], device)
    print(f"pixels: {loader}")

    def encode_split(title: str, split: int, flip: bool = False) -> list[Path]:
        split_rows = torch.from_numpy(rows[split])
        encode_latents = make_latent_encoder(config, vae, loader, split_rows, flip)

        def encode_chunk(chunk: range, advance: Callable[[int], object]) -> dict[str, Tensor]:
            content = encode_latents(chunk, advance)
            images.verified.result()  # raises if the cached pixels are damaged, before their latents are written
            return content

        return encode_in_chunks(scratch, title, "img", len(split_rows), encode_chunk)

    chunks = {"mean": encode_split("encoding", TRAIN), "val_mean": encode_split("encoding validation", VAL)}
    if config.data.flip:
        chunks["mean_flipped"] = encode_split("encoding mirrored", TRAIN, flip=True)
    if encoder:
        embed_chunk = make_caption_encoder(encoder, texts, cfg.batch_size)
        chunks["text"] = encode_in_chunks(scratch, "embedding captions", "caption", len(texts), embed_chunk)
    distributed.barrier()
    if not distributed.is_main():
        return

    means = {name: join_chunks(chunks[name], "mean") for name in chunks if name != "text"}
    try:
        normalizer = Normalizer.measure(means["mean"], cfg.normalization)
    except ValueError as error:
        raise UserError(f"{vae_path(config)}: {error}") from None
    text = None
    if encoder:
        values, lengths, truncated = (join_chunks(chunks["text"], key) for key in ("values", "lengths", "truncated"))
        text = CaptionEmbeddings(encoder.model, encoder.fingerprint, encoder.pooling, values, lengths)
        if int(truncated.sum()):
            print(f"note: {int(truncated.sum()):,} captions are longer than {encoder.max_length} tokens and were truncated")
    LatentDataset(**{"mean_flipped": None, **means}, normalizer=normalizer, text=text, **result).save(path)
    shutil.rmtree(scratch, ignore_errors=True)  # NFS keeps files that are still memory-mapped
    print(latent_table(normalizer))
    print(f"done: {path}")


def make_latent_encoder(config: Config, vae: VAE, loader: BatchLoader, rows: Tensor, flip: bool) -> EncodeChunk:
    """Return a function that encodes a chunk of the images `rows` to posterior means. `flip` mirrors the images first."""
    cfg, device, dtype = config.encodings, loader.device, pick_precision(config.precision, loader.device)
    storage_dtype, size = getattr(torch, cfg.dtype), [side // vae.downsampling for side in config.data.size]

    def encode_chunk(chunk: range, advance: Callable[[int], object]) -> dict[str, Tensor]:
        means = torch.empty(len(chunk), vae.latent_channels, *size, dtype=storage_dtype, device=device)
        batches = rows[chunk.start : chunk.stop].split(cfg.batch_size)
        for start, batch, next_batch in zip(count(0, cfg.batch_size), batches, [*batches[1:], None]):
            x = to_float(loader.batch(batch, next_batch))
            with torch.no_grad(), autocast(device, dtype):
                mean = vae.encode((x.flip(3) if flip else x).contiguous(memory_format=torch.channels_last)).mean
            means[start : start + len(x)] = mean.to(storage_dtype)
            advance(len(x))
        if not torch.isfinite(means).all():
            raise UserError(
                f"{vae_path(config)} produces latents outside the range of {cfg.dtype}: use encodings.dtype=bfloat16, "
                f"or train the VAE with a larger vae.kl_weight"
            )
        return {"mean": means.cpu()}

    return encode_chunk


def make_caption_encoder(encoder: TextEncoder, captions: list[str], batch_size: int) -> EncodeChunk:
    """Return a function that encodes a chunk of captions to token embeddings."""

    def encode_chunk(chunk: range, advance: Callable[[int], object]) -> dict[str, Tensor]:
        embeddings, truncated_before = {}, encoder.num_truncated
        order = sorted(chunk, key=lambda i: len(captions[i]))  # similar lengths need little padding
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            embeddings |= zip(batch, (e.half() for e in encoder.encode([captions[i] for i in batch])))
            advance(len(batch))
        joined = CaptionEmbeddings.from_encoder(encoder, [embeddings[i] for i in chunk])
        truncated = torch.tensor([encoder.num_truncated - truncated_before])
        return {"values": joined.values, "lengths": joined.lengths, "truncated": truncated}

    return encode_chunk


def is_up_to_date(path: Path, result: dict, encoder: TextEncoder | None, config: Config) -> bool:
    """Return whether encodings.pt already contains what this run would write. A damaged file is out of date."""
    try:
        stored = LatentDataset.load(path)
    except UserError:
        return False

    def same(name: str) -> bool:
        old, new = getattr(stored, name), result[name]
        return torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old is new or old == new

    return (
        all(same(name) for name in result)
        and (encoder is None or (stored.text is not None and stored.text.fingerprint == encoder.fingerprint))
        and not stored.differences(config)
    )


def latent_table(normalizer: Normalizer) -> str:
    """Format the statistics of the scaled latents, one line per channel."""
    n = normalizer
    lines = [
        f"scaled latents: overall std {n.overall_std():.3f}",
        "channel   shift    scale     mean     std  kurtosis   range",
    ]
    for c in range(len(n.std)):
        moments = f"{n.mean[c]:8.3f} {n.std[c]:7.3f} {n.kurtosis[c]:9.2f}"
        lines.append(f"{c:7d} {n.shift[c]:7.3f} {n.scale[c]:8.3f} {moments}   {n.low[c]:.2f} … {n.high[c]:.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return cli.run(encode, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
