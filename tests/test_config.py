"""The schema and the loader: what is read, and the one line that bad input gets."""

import subprocess
import sys

import pytest
from conftest import ROOT

from config import Config
from lab.errors import UserError
from lab.settings import help_text, load_config, walk


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    assert config.data.image_size % (config.vae.patch * 2 ** (len(config.vae.widths) - 1)) == 0


def test_yaml_and_overrides(tmp_path):
    path = write(tmp_path, "vae: {lr: 1e-4, widths: [8, 16]}\nsampling: {x0_clamp: 1.0}\n")
    config = load_config(
        path, ["diffusion.schedule=linear", "vae.widths=[16, 32]", "data.limit=null", "sampling.x0_clamp=none"]
    )
    assert config.vae.lr == 1e-4 and config.vae.widths == [16, 32]
    assert config.diffusion_name == "linear" and config.sampling.x0_clamp == "none"
    assert load_config(path).sampling.x0_clamp == 1.0


def test_base_is_changed_key_by_key(tmp_path):
    write(tmp_path, "name: below\nvae: {lr: 1e-3, blocks: 2}\n", "base.yaml")
    config = load_config(write(tmp_path, "base: base.yaml\nname: above\nvae: {blocks: 3}\n"))
    assert (config.name, config.vae.lr, config.vae.blocks) == ("above", 1e-3, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("vae: {lr: 1, lr: 2}", r"c.yaml:1: key 'lr' is given twice"),
        ("vae: [", r"c.yaml:\d"),
        ("- a", "mapping"),
        ("[a]: 1", "c.yaml"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_a_base_of_a_base_is_refused(tmp_path):
    write(tmp_path, "base: other.yaml", "base.yaml")
    with pytest.raises(UserError, match="one level"):
        load_config(write(tmp_path, "base: base.yaml"))


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as error:
        load_config(None, ["vae.widht=3", "vae.steps=1.5", "sampling.eta=2", "data.source=ffhq", "diffusion.sheduel=linear"])
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "vae.widht: unknown key, did you mean vae.widths?",
        "vae.steps",
        "sampling.eta",
        "data.source",
        "did you mean diffusion.schedule?",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.image_size=66", "down-sampling factor 4"),
        ("data.image_size=72", "cannot be halved"),
        ("sampling.steps=2000", "more than diffusion.timesteps"),
        ("sampling.autoguidance=weak.safetensors", "no effect with sampling.guidance=1"),
        ("sampling.guidance_interval=[0.2, 3]", "no effect with sampling.guidance=1"),
        ("sampling.guidance_rescale=0.7", "no effect with sampling.guidance=1"),
        ("sampling.sampler=eulr", "ancestral"),
        ("compile=maybe", r"^compile: input should be 'auto' or input should be a valid boolean \(got 'maybe'\)$"),
        ("sampling.labels=[[1]]", r"^sampling.labels.0: [^:]*\(got \[1\]\)$"),
        ("sampling.x0_clamp=-1.0", "x0_clamp"),
        ("diffusion.name=vae", "taken"),
        ("name=../x", "name"),
        ("vae.lr=abc", "valid number"),
        ("vae=3", "vae"),
        ("seed.x=3", "seed"),
        ("vae.lr=[", "cannot read"),
        ("vae.lr=.inf", "finite"),
        ("name=2024-99-99", "cannot read"),
        ("seed=99999999999999999999", "seed"),
        ("diffusion.widths=[130, 256]", "multiple of 4"),
        ("diffusion.name=encodings.pt", "taken"),
        ("name=cache", "taken"),
    ],
)
def test_bad_values(override, message):
    with pytest.raises(UserError, match=message):
        load_config(None, ["sampling.clean_steps=0", override])


def test_patches_need_pictures_larger_than_they_are():
    with pytest.raises(UserError, match="24 pixels or more, not data.image_size=16"):
        load_config(None, ["data.image_size=16", "vae.adversarial.weight=0.1"])
    assert load_config(None, ["data.image_size=24", "vae.widths=[8]", "diffusion.widths=[8]", "vae.adversarial.weight=0.1"])


def test_samplers_and_schedules_of_the_schema_exist():
    from typing import get_args

    from models.schedules import PREDICTIONS, SCHEDULES
    from solvers import SAMPLERS
    from sources.images import SOURCES

    fields = dict(walk(Config))
    assert set(get_args(fields["sampling.sampler"].annotation)) == set(SAMPLERS)
    assert set(get_args(fields["diffusion.schedule"].annotation)) == set(SCHEDULES)
    assert set(get_args(fields["diffusion.prediction"].annotation)) == set(PREDICTIONS)
    assert set(get_args(fields["data.source"].annotation)) == set(SOURCES)


def test_help_names_every_key():
    text = help_text("A stage.")
    for name, field in walk(Config):
        assert f"{name} = " in text and field.description, name


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["--help"], 0, "diffusion.schedule"),
        (["nowhere.yaml"], 2, "does not exist"),
        (["--fast"], 2, "unknown option"),
        (["a.yaml", "b.yaml"], 2, "one config at a time"),
    ],
)
def test_answers_without_torch(argv, code, message):
    """--help and a wrong command line end before torch is imported."""
    program = f"import sys, runpy; sys.argv = ['infer.py', *{argv!r}]\ntry: runpy.run_path('infer.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
