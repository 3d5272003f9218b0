"""Write <RESULTS_DIR>/index.html: all grids with settings and metrics, a side-by-side view of any two, and all reports.

    python tools/gallery.py [RESULTS_DIR] [RUNS_DIR]          # results and runs by default

The page is static: open the file in a browser. Grids and reports are read from RESULTS_DIR and RESULTS_DIR/published,
settings and metrics from the metadata of the grids' PNG files. Loss curves are copied from RUNS_DIR.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image, UnidentifiedImageError

FOLDERS = (".", "published")  # subfolders of RESULTS_DIR with grids and reports
METRICS = ("std_ratio", "worst_channel_ratio", "clamped", "out_of_range")
SETTINGS = (
    "sampler", "steps", "eta", "x0_clamp", "guidance", "guidance_interval", "guidance_rescale", "clean_finish_steps", "seed"
)  # fmt: skip

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nanoLDM results</title>
<style>
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
</style>
</head>
<body>
{% macro table(rows) %}
<table>{% for name, value in rows %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% endmacro %}
{% macro image(src, alt) %}<img loading="lazy" src="{{ src|urlencode }}" alt="{{ alt }}">{% endmacro %}
<h1>nanoLDM results</h1>
{% if grids %}
<h2>Side by side</h2>
<div class="pair">
{% for selected in first_pair %}
<div class="side"><select aria-label="grid to compare">
{% for grid in grids %}<option{{ " selected" if loop.index0 == selected }}>{{ grid.name }}</option>{% endfor %}
</select><div></div></div>
{% endfor %}
</div>
{% else %}
<p>No grids yet.</p>
{% endif %}
<h2>All grids</h2>
<div class="pair">
{% for grid in grids %}
<article id="{{ grid.name }}"><h3>{{ grid.name }}</h3>
<a href="{{ grid.image|urlencode }}">{{ image(grid.image, "grid of generated images") }}</a>
{{ table(grid.metrics) }}
<details><summary>settings, command, sampling, training</summary>
{{ table(grid.settings + grid.details) }}
<pre>{{ grid.command }}</pre>
{% for src in related_images(grid) %}<p>{{ image(src, src) }}</p>{% endfor %}
</details></article>
{% endfor %}
</div>
<h2>Reports</h2>
{% for name, plot, text in reports %}
<section><h3>{{ name }}</h3>{% if plot %}<p>{{ image(plot, "plot") }}</p>{% endif %}
<details><summary>report</summary><pre>{{ text }}</pre></details></section>
{% endfor %}
<script>
const articles = Object.fromEntries([...document.querySelectorAll("article")].map(x => [x.id, x.innerHTML]));
for (const side of document.querySelectorAll(".side")) {
  const select = side.querySelector("select"), view = side.querySelector("div");
  const update = () => { view.innerHTML = articles[select.value]; };
  select.addEventListener("change", update);
  update();
}
</script>
</body>
</html>
"""


@dataclass
class Grid:
    """An image grid that infer.py wrote, with its metadata."""

    image: str  # path relative to the results folder
    config: dict
    latent_stats: dict
    command: str
    details: list[tuple[str, str]]  # (name, value): hardware, seconds, commit, …

    @property
    def name(self) -> str:
        return self.image.removesuffix(".png")

    @property
    def diffusion_name(self) -> str:
        return self.config["diffusion"].get("name") or self.config["diffusion"]["schedule"]

    @property
    def curves(self) -> str:
        return str(Path(self.image).with_name(f"{self.config['name']}_{self.diffusion_name}_curves.png"))

    @property
    def metrics(self) -> list[tuple[str, str]]:
        return [(key.replace("_", " "), f"{self.latent_stats[key]:.3f}") for key in METRICS if key in self.latent_stats]

    @property
    def settings(self) -> list[tuple[str, str]]:
        sampling = self.config["sampling"]
        return [(key, str(sampling[key])) for key in SETTINGS if sampling.get(key) is not None]


def read_grid(results: Path, path: Path) -> Grid | None:
    """Read a grid and its metadata. Return None for images that infer.py did not write."""
    try:
        with Image.open(path) as image:
            text = dict(image.text) if hasattr(image, "text") else {}
        model = json.loads(text["model"])
        details = [
            ("hardware", text["hardware"]),
            ("seconds", text["seconds"]),
            ("commit", text["commit"]),
            ("spacing", text["spacing"]),
            ("schedule", model["schedule"]),
            ("prediction", model["prediction"]),
            ("training steps", f"{model['step']:,}"),
        ]
        image_path = path.relative_to(results).as_posix()
        return Grid(image_path, json.loads(text["config"]), json.loads(text["latent_stats"]), text["command"], details)
    except (UnidentifiedImageError, OSError, KeyError, ValueError, TypeError):
        return None


def copy_curves(results: Path, runs: Path, grids: list[Grid]) -> None:
    """Copy the loss curves of grids from `runs` to `results`, except for grids in published/: their curves are there."""
    for grid in grids:
        curves = runs / grid.config["name"] / grid.diffusion_name / "curves.png"
        if curves.is_file() and "/" not in grid.image:
            shutil.copyfile(curves, results / grid.curves)


def first_pair(grids: list[Grid]) -> tuple[int, int]:
    """Return the indices of the two grids that the page compares at first.

    Preferably, they come from two U-Nets of one experiment, such as cosine and linear, with equal sampling settings.
    Otherwise, they are the first two grids.
    """
    for i, a in enumerate(grids):
        for j, b in enumerate(grids[i + 1 :], start=i + 1):
            same = a.config["name"] == b.config["name"] and a.config["sampling"] == b.config["sampling"]
            if same and a.diffusion_name != b.diffusion_name:
                return i, j
    return 0, min(1, len(grids) - 1)


def build(results: Path, runs: Path) -> Path:
    grids = [grid for path in files(results, "*.png") if (grid := read_grid(results, path))]
    copy_curves(results, runs, grids)

    def related_images(grid: Grid) -> list[str]:
        candidates = (f"{grid.name}_strip.gif", f"{grid.name}_strip.png", grid.curves)
        return [name for name in candidates if (results / name).exists()]

    reports = []
    for path in files(results, "*.md"):
        if path.name != "README.md":
            report, plot = path.relative_to(results), path.with_suffix(".png")
            plot_src = report.with_suffix(".png").as_posix() if plot.exists() else None
            reports.append((report.with_suffix("").as_posix(), plot_src, path.read_text(encoding="utf-8")))
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    page = template.render(grids=grids, first_pair=first_pair(grids), related_images=related_images, reports=reports)
    path = results / "index.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def files(results: Path, pattern: str) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((results / folder).glob(pattern))]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    results, runs = Path(argv[0] if argv else "results"), Path(argv[1] if len(argv) > 1 else "runs")
    if not results.is_dir():
        print(f"error: {results} is not a folder", file=sys.stderr)
        return 2
    print(f"done: {build(results, runs)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
