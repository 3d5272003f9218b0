"""results/index.html: every grid in results/ with its settings, figures, strip and command, any two side by side.

    python gallery.py [RESULTS_DIR] [RUNS_DIR]

One static page without a server or anything from elsewhere: it works from file://, on a phone too. What a grid was made
with is read from the PNG itself. Loss curves found in RUNS_DIR are copied beside the grids of the same model.
"""

import html
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1400px; }
img { max-width: 100%; height: auto; image-rendering: pixelated; }
table { border-collapse: collapse; } td, th { border: 1px solid var(--line); padding: .15rem .5rem; text-align: left; }
pre { overflow-x: auto; padding: .5rem; border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
h3 { overflow-wrap: anywhere; }
select { width: 100%; font: inherit; padding: .3rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
.pair > * { min-width: 0; }
section { border-top: 1px solid var(--line); margin-top: 1.5rem; overflow-x: auto; }
"""
SCRIPT = """
const cards = Object.fromEntries([...document.querySelectorAll("article")].map(card => [card.id, card.innerHTML]));
for (const side of document.querySelectorAll(".side")) {
  const choice = side.querySelector("select"), shown = side.querySelector("div");
  const show = () => { shown.innerHTML = cards[choice.value]; };
  choice.addEventListener("change", show);
  show();
}
"""
SHOWN = ("std_ratio", "worst_channel_ratio", "clamped", "out_of_range")
SETTINGS = (
    "sampler",
    "steps",
    "eta",
    "x0_clamp",
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "clean_steps",
    "seed",
)


@dataclass
class Grid:
    """A picture of results/ that infer.py made, and what lies beside it."""

    path: Path
    config: dict
    calibration: dict
    command: str
    details: list[tuple[str, str]]  # hardware, seconds, commit, schedule, training steps

    @property
    def folder(self) -> str:
        """Of the U-Net in its experiment."""
        return self.config["diffusion"].get("name") or self.config["diffusion"]["schedule"]

    @property
    def model(self) -> str:
        return f"{self.config['name']}_{self.folder}"

    @property
    def beside(self) -> list[Path]:
        """Its strip, and the curves of its model."""
        names = (f"{self.path.stem}_strip.gif", f"{self.path.stem}_strip.png", f"{self.model}_curves.png")
        return [self.path.with_name(name) for name in names if self.path.with_name(name).exists()]


def read(path: Path) -> Grid | None:
    """What infer.py wrote into a PNG; None for other pictures."""
    try:
        with Image.open(path) as image:
            text = dict(image.text) if hasattr(image, "text") else {}
        model = json.loads(text["model"])
        details = [("hardware", text["hardware"]), ("seconds", text["seconds"]), ("commit", text["commit"]), ("steps by", text.get("spacing", "trailing")), ("schedule", model["schedule"]),
                   ("predicts", model["prediction"]), ("training steps", f"{model['step']:,}")]  # fmt: skip
        return Grid(path, json.loads(text["config"]), json.loads(text["calibration"]), text["command"], details)
    except (UnidentifiedImageError, OSError, KeyError, ValueError, TypeError):
        return None


def copy_curves(results: Path, runs: Path, grids: list[Grid]) -> None:
    for grid in grids:
        curves = runs / grid.config["name"] / grid.folder / "curves.png"
        if curves.is_file():
            shutil.copyfile(curves, results / f"{grid.model}_curves.png")


def table(rows: list[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows) + "</table>"


def card(grid: Grid) -> str:
    picture = html.escape(grid.path.name)
    figures = [(name.replace("_", " "), f"{grid.calibration[name]:.3f}") for name in SHOWN if name in grid.calibration]
    settings = [
        (name, str(grid.config["sampling"][name])) for name in SETTINGS if grid.config["sampling"].get(name) is not None
    ]
    beside = "".join(
        f'<p><img loading="lazy" src="{html.escape(p.name)}" alt="{html.escape(p.stem)}"></p>' for p in grid.beside
    )
    return (
        f'<article id="{html.escape(grid.path.stem)}"><h3>{html.escape(grid.path.stem)}</h3>'
        f'<a href="{picture}"><img loading="lazy" src="{picture}" alt="grid of generated pictures"></a>'
        f"{table(figures)}<details><summary>settings, command, process</summary>{table(settings + grid.details)}"
        f"<pre>{html.escape(grid.command)}</pre>{beside}</details></article>"
    )


def page_of_text(path: Path) -> str:
    """A Markdown page that evaluate.py wrote, as it is; its plot above it."""
    plot = path.with_suffix(".png")
    shown = f'<p><img loading="lazy" src="{html.escape(plot.name)}" alt="plot"></p>' if plot.exists() else ""
    figures = html.escape(path.read_text(encoding="utf-8"))
    return f"<section><h3>{html.escape(path.stem)}</h3>{shown}<details><summary>figures</summary><pre>{figures}</pre></details></section>"


def first_pair(grids: list[Grid]) -> tuple[int, int]:
    """Which two to show first: two models of one experiment drawn in the same way (cosine | linear), where there are such."""
    for i, one in enumerate(grids):
        for j, other in enumerate(grids[i + 1 :], start=i + 1):
            same = one.config["name"] == other.config["name"] and one.config["sampling"] == other.config["sampling"]
            if same and one.folder != other.folder:
                return i, j
    return 0, min(1, len(grids) - 1)


def build(results: Path, runs: Path) -> Path:
    """Write results/index.html. Raises FileNotFoundError where there is no such folder."""
    grids = [grid for path in sorted(results.glob("*.png")) if (grid := read(path))]
    copy_curves(results, runs, grids)
    names = [grid.path.stem for grid in grids]

    def side(chosen: int) -> str:
        options = "".join(
            f"<option{' selected' if i == chosen else ''}>{html.escape(n)}</option>" for i, n in enumerate(names)
        )
        return f'<div class="side"><select aria-label="grid to compare">{options}</select><div></div></div>'

    compare = "<p>No grids yet.</p>"
    if grids:
        compare = f'<h2>Side by side</h2><div class="pair">{"".join(map(side, first_pair(grids)))}</div>'
    pages = "".join(page_of_text(p) for p in sorted(results.glob("*.md")) if p.name != "README.md")
    body = (
        f"<h1>nanoLDM results</h1>{compare}<h2>All grids</h2><div class='pair'>{''.join(map(card, grids))}</div>"
        f"<h2>Evaluations</h2>{pages}<script>{SCRIPT}</script>"
    )
    path = results / "index.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>nanoLDM results</title><style>{STYLE}</style></head><body>{body}</body></html>\n",
        encoding="utf-8",
    )
    temporary.replace(path)
    return path


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    results, runs = Path(argv[0] if argv else "results"), Path(argv[1] if len(argv) > 1 else "runs")
    if not results.is_dir():
        print(f"error: {results} is not a folder", file=sys.stderr)
        return 2
    path = build(results, runs)
    print(f"done: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
