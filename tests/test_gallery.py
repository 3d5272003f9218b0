"""The gallery: its HTML, read by a parser and, if installed, by Chromium."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image, PngImagePlugin

from tools import gallery

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, attribute):
        return [attrs[attribute] for t, attrs in self.tags if t == tag and attribute in attrs]


@pytest.fixture
def results(trained, tmp_path):
    """Two grids, a strip, a report, and two files that infer.py did not write."""
    folder = tmp_path / "results"
    for option in ("sampling.trajectory_frames=2", "sampling.sampler=unipc"):
        assert trained.run("infer", f"results_dir={folder}", option) == 0
    (folder / "tiny_latents.md").write_text("# Latents <of> tiny")
    Image.new("RGB", (8, 8)).save(folder / "holiday.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_page_shows_every_grid_and_nothing_else(results, trained):
    assert gallery.main([str(results), str(trained.folder / "runs")]) == 0
    page = Page(results / "index.html")
    assert set(page.all("article", "id")) == {"tiny_cosine_ddim_2x3", "tiny_cosine_unipc_2x3"}
    sources = page.all("img", "src") + page.all("a", "href")
    assert all((results / source).is_file() for source in sources)
    assert not any("//" in source or source.startswith("/") for source in sources)
    assert {"tiny_cosine_ddim_2x3.png", "tiny_cosine_ddim_2x3_strip.gif", "tiny_cosine_curves.png"} <= set(sources)
    assert "sampling.trajectory_frames=2" in page.text and "std ratio" in page.text and "# Latents <of> tiny" in page.text
    assert "holiday" not in page.text and "broken" not in page.text
    assert not page.all("script", "src") and not page.all("link", "href")


def test_published_results_are_included(results, trained):
    published = results / "published"
    published.mkdir()
    shutil.copy(results / "tiny_cosine_unipc_2x3.png", published / "50% #1.png")
    (published / "tiny_loss.md").write_text("# Denoising error")
    (published / "tiny_cosine_curves.png").write_bytes(b"curves")
    assert gallery.main([str(results), str(trained.folder / "runs")]) == 0
    page = Page(results / "index.html")
    assert "published/50% #1" in page.all("article", "id") and "# Denoising error" in page.text
    sources = [unquote(source) for source in page.all("img", "src")]
    assert {"published/50% #1.png", "published/tiny_cosine_curves.png", "tiny_cosine_curves.png"} <= set(sources)
    assert all((results / source).is_file() for source in sources) and "published/50%25%20%231.png" in page.all("img", "src")
    assert (published / "tiny_cosine_curves.png").read_bytes() == b"curves"


def test_comparison_starts_with_two_models_of_one_experiment():
    def grid(name, schedule, **sampling):
        return gallery.Grid("x.png", {"name": name, "diffusion": {"schedule": schedule}, "sampling": sampling}, {}, "", [])

    others = [grid("a", "cosine", rows=2), grid("a", "cosine", rows=4), grid("b", "linear", rows=4)]
    assert gallery.first_pair(others) == (0, 1)
    assert gallery.first_pair([*others, grid("a", "linear", rows=4)]) == (1, 3)
    assert gallery.first_pair(others[:1]) == (0, 0)


def test_text_is_escaped(results):
    with Image.open(results / "tiny_cosine_unipc_2x3.png") as image:
        image.load()
        info = PngImagePlugin.PngInfo()
        for key, value in image.text.items():
            info.add_itxt(key, "<script>alert(1)</script>" if key == "command" else value)
    image.save(results / "tiny_cosine_unipc_2x3.png", pnginfo=info)
    gallery.main([str(results), "none"])
    page = (results / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_empty_and_missing_folders(tmp_path, capsys):
    assert gallery.main([str(tmp_path)]) == 0 and "No grids yet" in (tmp_path / "index.html").read_text()
    assert gallery.main([str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err


def rendered(page, *options) -> str:
    """The DOM after Chromium has run the page's script."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000", *options]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout


@needs_chromium
def test_script_fills_both_sides_of_the_comparison(results):
    gallery.main([str(results), "none"])
    sides = rendered(results / "index.html").split('class="side"')[1:]
    assert len(sides) == 2 and all(json.dumps("grid of generated images") in side.split("</article>")[0] for side in sides)


@needs_chromium
def test_page_fits_the_width_of_a_phone(results):
    shutil.copy(results / "tiny_cosine_unipc_2x3.png", results / f"{'a_long_name_without_a_break' * 4}.png")
    gallery.main([str(results), "none"])
    page, root = results / "index.html", "document.documentElement"
    script = f"<script>document.title = {root}.scrollWidth + ' of ' + {root}.clientWidth;</script>"
    page.write_text(page.read_text().replace("</body>", script + "</body>"))
    title = rendered(page, "--window-size=500,900").split("<title>")[1].split("</title>")[0]
    content_width, window_width = title.split(" of ")
    assert int(content_width) <= int(window_width) <= 500
