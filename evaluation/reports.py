"""Markdown reports in results/, and the summary that evaluate.py prints before it starts."""

from pathlib import Path
from typing import Iterable, Sequence

import torch

from config import Config
from utils import cli
from utils.device import hardware_name
from utils.files import keep_old_version, require_space, write_atomically


def print_plan(config: Config, summary: str, device: torch.device, dtype: torch.dtype, files: list[str]) -> None:
    require_space(Path(config.results_dir), 10_000_000)
    print(f"evaluation.task={config.evaluation.task}: {summary}, on {device} in {str(dtype)[6:]}")
    print(f"files: {', '.join(f'{config.results_dir}/{file}' for file in files)}")


def write_report(config: Config, name: str, device: torch.device, origin: str, text: str) -> None:
    """Print a report and write it to results/<name>.md.

    An existing report of another command or of other weights is renamed, not overwritten.
    """
    path, source = Path(config.results_dir) / f"{name}.md", f"`{cli.command}`, {origin}"
    if path.exists() and source not in path.read_text(encoding="utf-8", errors="replace"):
        keep_old_version(path.parent, name, (".md", ".png", "_nearest.png"))
    report = f"{text}\n\n{source}, on {hardware_name(device)}, commit {cli.commit()}.\n"
    write_atomically(path, lambda temporary: temporary.write_text(report, encoding="utf-8"))
    print(text)
    print(f"done: {path}")


def weights_origin(network: str, fingerprint: str, metadata: dict) -> str:
    return f"{network} at step {metadata['step']:,} ({fingerprint})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
