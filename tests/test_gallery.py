"""The gallery: what a browser is given, read back by an HTML parser; and by Chromium where there is one."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image, PngImagePlugin

import gallery


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
    """Two grids of the tiny experiment, one with a strip, a page of figures, and a picture that is none of ours."""
    folder = tmp_path / "results"
    for option in ("sampling.strip=2", "sampling.sampler=unipc"):
        assert trained.run("infer", f"results_dir={folder}", option) == 0
    (folder / "tiny_latents.md").write_text("# Latents <of> tiny")
    Image.new("RGB", (8, 8)).save(folder / "holiday.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_every_grid_with_its_settings_and_nothing_from_elsewhere(results, trained):
    assert gallery.main([str(results), str(trained.folder / "runs")]) == 0
    page = Page(results / "index.html")
    grids = {"tiny_cosine_ddim_2x3", "tiny_cosine_unipc_2x3"}
    assert set(page.all("article", "id")) == grids
    sources = page.all("img", "src") + page.all("a", "href")
    assert all((results / source).is_file() for source in sources) and not any(
        "//" in s or s.startswith("/") for s in sources
    )
    assert {"tiny_cosine_ddim_2x3.png", "tiny_cosine_ddim_2x3_strip.gif", "tiny_cosine_curves.png"} <= set(sources)
    assert "sampling.strip=2" in page.text and "std ratio" in page.text and "# Latents <of> tiny" in page.text
    assert "holiday" not in page.text and "broken" not in page.text
    assert not page.all("script", "src") and not page.all("link", "href")


def test_two_models_of_one_experiment_are_shown_first():
    def grid(name, schedule, **sampling):
        return gallery.Grid(None, {"name": name, "diffusion": {"schedule": schedule}, "sampling": sampling}, {}, "", [])

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


def test_an_empty_folder_and_none(tmp_path, capsys):
    assert gallery.main([str(tmp_path)]) == 0 and "No grids yet" in (tmp_path / "index.html").read_text()
    assert gallery.main([str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err


def test_in_a_browser(results):
    """Chromium shows both sides of the comparison, which the page's script fills."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    gallery.main([str(results), "none"])
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000", (results / "index.html").as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    sides = shown.split('class="side"')[1:]
    assert len(sides) == 2 and all(json.dumps("grid of generated pictures") in side.split("</article>")[0] for side in sides)


def test_nothing_is_wider_than_a_phone(results):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    for path in list(results.glob("tiny_cosine_unipc_2x3.png")):
        shutil.copy(path, results / f"{'a_long_name_without_a_break' * 4}.png")
    gallery.main([str(results), "none"])
    page = results / "index.html"
    report = "<script>document.title = document.documentElement.scrollWidth + ' of ' + document.documentElement.clientWidth;</script>"
    page.write_text(page.read_text().replace("</body>", report + "</body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom", "--virtual-time-budget=2000", page.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    wide, window = shown.split("<title>")[1].split("</title>")[0].split(" of ")
    assert int(wide) <= int(window) <= 500
