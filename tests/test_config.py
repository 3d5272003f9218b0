"""Config schema and loader: values that are read, and the one-line errors for bad input."""

import subprocess
import sys

import lpips
import pytest
import torch
import torchvision
from conftest import ROOT

from config import MIN_PERCEPTUAL_SIZES, Config
from models.perceptual import VGG19_LAYERS
from utils.errors import UserError
from utils.settings import help_text, load_config, walk


def write(tmp_path, text, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    assert config.data.image_size % (config.vae.patch_size * 2 ** (len(config.vae.channels) - 1)) == 0


def test_yaml_and_overrides(tmp_path):
    path = write(tmp_path, "vae: {lr: 1e-4, channels: [8, 16]}\nsampling: {x0_clamp: 1.0}\n")
    config = load_config(
        path, ["diffusion.schedule=linear", "vae.channels=[16, 32]", "data.max_train_images=null", "sampling.x0_clamp=none"]
    )
    assert config.vae.lr == 1e-4 and config.vae.channels == [16, 32]
    assert config.diffusion_name == "linear" and config.sampling.x0_clamp == "none"
    assert load_config(path).sampling.x0_clamp == 1.0


TEXTS = ("photos #2 (best)", "[old] set", "my: set", "{x}", "2024", "010", "no", "1e3", "2024-99-99", "'quoted'", "~user x")


@pytest.mark.parametrize("text", TEXTS)
def test_text_settings_are_taken_literally(text):
    options = [f"data.path=/{text}", f"data.caption_column={text}", f"text.model={text}", "diffusion.name=010"]
    config = load_config(None, ["data.source=folder", *options])
    assert (config.data.path, config.data.caption_column, config.text.model) == (f"/{text}", text, text)
    assert config.diffusion_name == "010" and load_config(None, ["data.path=null"]).data.path is None


def test_labels_are_text_on_the_command_line_and_in_files(tmp_path):
    labels = ["010", "on", "no", "1e3", "1_0", "2024-01-01", "null", "~", {"glasses": "yes", "010": "0x1F"}]
    text = "[010, on, no, 1e3, 1_0, 2024-01-01, null, ~, {glasses: yes, 010: 0x1F}]"
    assert load_config(None, [f"sampling.labels={text}"]).sampling.labels == labels
    path = write(tmp_path, f"name: 010\nsampling: {{labels: {text}, steps: 0x10}}\ndiffusion: {{labels: [no, 010]}}\n")
    config = load_config(path, ["sampling.prompts=null"])
    assert config.sampling.labels == labels and config.sampling.steps == 16
    assert config.diffusion.labels == ["no", "010"] and config.name == "010" and config.sampling.prompts is None


@pytest.mark.parametrize("override", ["seed=010", "vae.max_minutes=1:30", "data.value_range=[0, 0100]"])
def test_numbers_in_base_8_or_60_are_errors(override):
    key = override.split("=")[0]
    with pytest.raises(UserError, match=f"^{key}: cannot read the value .* is ambiguous"):
        load_config(None, [override])


def test_settings_of_other_sources_are_errors():
    for override, source in (("data.split=train", "folder"), ("data.label_column=Smiling", "celeba")):
        with pytest.raises(UserError, match=f"{override.split('=')[0]} needs data.source=huggingface.* .got {source}"):
            load_config(None, [f"data.source={source}", override])


@pytest.mark.parametrize("net", MIN_PERCEPTUAL_SIZES)
def test_smallest_images_of_perceptual_networks(net):
    """On the meta device, which checks shapes without computing."""
    smallest = MIN_PERCEPTUAL_SIZES[net]
    with torch.device("meta"):
        if net == "vgg19":
            layers = torchvision.models.vgg19().features[: VGG19_LAYERS[-1] + 1]
        else:
            layers = lpips.LPIPS(net=net, pnet_rand=True, lpips=False, verbose=False).net
        layers(torch.zeros(1, 3, smallest, smallest))
        with pytest.raises(RuntimeError):
            layers(torch.zeros(1, 3, smallest - 1, smallest - 1))
    channels = ["vae.channels=[8]", "diffusion.channels=[8]", f"vae.perceptual.net={net}"]
    assert load_config(None, [f"data.image_size={max(smallest, 8)}", *channels])
    if smallest > 8:
        message = rf"data.image_size must be at least {smallest} if vae.perceptual.net={net} \(got {smallest - 1}\)"
        with pytest.raises(UserError, match=message):
            load_config(None, [f"data.image_size={smallest - 1}", *channels])


def test_base_config_is_merged_key_by_key(tmp_path):
    write(tmp_path, "name: base\nvae: {lr: 1e-3, num_res_blocks: 2}\n", "base.yaml")
    config = load_config(write(tmp_path, "base: base.yaml\nname: changed\nvae: {num_res_blocks: 3}\n"))
    assert (config.name, config.vae.lr, config.vae.num_res_blocks) == ("changed", 1e-3, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("vae: {lr: 1, lr: 2}", r"c.yaml:1: duplicate key 'lr'"),
        ("vae: [", r"c.yaml:\d"),
        ("- a", "mapping"),
        ("[a]: 1", "c.yaml"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_base_of_a_base_is_rejected(tmp_path):
    write(tmp_path, "base: other.yaml", "base.yaml")
    with pytest.raises(UserError, match="only one level is supported"):
        load_config(write(tmp_path, "base: base.yaml"))


def test_all_errors_are_reported_together():
    with pytest.raises(UserError) as error:
        load_config(
            None, ["vae.chanels=3", "vae.steps=1.5", "sampling.eta=2", "data.source=ffhq", "diffusion.sheduel=linear"]
        )
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "vae.chanels: unknown key, did you mean vae.channels?",
        "vae.steps",
        "sampling.eta",
        "data.source",
        "did you mean diffusion.schedule?",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.image_size=66", "must be a multiple of 4, the VAE's downsampling factor"),
        ("data.image_size=72", "cannot be halved"),
        ("sampling.steps=2000", "must be at most diffusion.timesteps = 1000 \\(got 2000\\)"),
        ("sampling.autoguidance=weak.safetensors", "autoguidance has no effect if sampling.guidance=1"),
        ("vae.perceptual.fraction=0", "vae.perceptual.fraction must be greater than 0"),
        ("sampling.guidance_interval=[0.2, 3]", "guidance_interval has no effect if sampling.guidance=1"),
        ("sampling.guidance_rescale=0.7", "guidance_rescale has no effect if sampling.guidance=1"),
        ("sampling.sampler=eulr", "ancestral"),
        ("compile=maybe", r"^compile must be 'auto' or a valid boolean \(got 'maybe'\)$"),
        ("sampling.labels=[[1]]", r"^sampling.labels.0 must [^:]*\(got \['1'\]\)$"),
        ("sampling.x0_clamp=-1.0", "x0_clamp"),
        ("diffusion.name=vae", "diffusion.name must not be 'vae'"),
        ("name=../x", "name"),
        ("vae.lr=abc", "valid number"),
        ("vae=3", "vae"),
        ("seed.x=3", "seed"),
        ("vae.lr=[", "cannot read"),
        ("vae.lr=.inf", "finite"),
        ("sampling.steps=2024-99-99", "cannot read"),
        ("name=" + 61 * "x", "name must have at most 60 characters"),
        ("data={source: cifar10, crop: ddim}", "data.crop=ddim is for photographs of CelebA"),
        ("data.value_range=[1, 1]", "data.value_range must be two different values"),
        ("seed=99999999999999999999", "seed"),
        ("diffusion.channels=[130, 256]", "multiple of 4"),
        ("diffusion.name=encodings.pt", "diffusion.name must not be 'encodings.pt'"),
        ("name=cache", "name must not be 'cache'"),
    ],
)
def test_bad_values(override, message):
    with pytest.raises(UserError, match=message):
        load_config(None, ["sampling.clean_finish_steps=0", override])


def test_discriminator_needs_large_enough_images():
    with pytest.raises(UserError, match=r"data.image_size must be at least 24 .*\(got 16\)"):
        load_config(None, ["data.image_size=16", "vae.adversarial.weight=0.1"])
    assert load_config(
        None, ["data.image_size=24", "vae.channels=[8]", "diffusion.channels=[8]", "vae.adversarial.weight=0.1"]
    )


def test_choices_of_the_schema_match_the_code():
    from typing import get_args

    from dataset.sources import SOURCES
    from models.schedules import PREDICTIONS, SCHEDULES
    from solvers import SAMPLERS

    fields = dict(walk(Config))
    assert set(get_args(fields["sampling.sampler"].annotation)) == set(SAMPLERS)
    assert set(get_args(fields["diffusion.schedule"].annotation)) == set(SCHEDULES)
    assert set(get_args(fields["diffusion.prediction"].annotation)) == set(PREDICTIONS)
    assert set(get_args(fields["data.source"].annotation)) == set(SOURCES)


def test_help_lists_every_key():
    text = help_text("A script.")
    for name, field in walk(Config):
        assert f"{name} = " in text and field.description, name


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["--help"], 0, "diffusion.schedule"),
        (["nowhere.yaml"], 2, "does not exist"),
        (["--fast"], 2, "unknown option"),
        (["a.yaml", "b.yaml"], 2, "at most one config file is allowed"),
    ],
)
def test_help_and_config_errors_do_not_import_torch(argv, code, message):
    program = f"import sys, runpy; sys.argv = ['infer.py', *{argv!r}]\ntry: runpy.run_path('infer.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
