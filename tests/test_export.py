"""export.py against diffusers' own pipeline, and training that starts from given weights."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Experiment
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from evaluation.reports import weights_origin, write_report
from export import scheduler_config
from models.schedules import make_schedule
from models.unet import UNet
from models.vae import VAE
from pipeline.model_card import report_sections, sample_section
from sampling import image_generators, timesteps
from utils.diffusers_format import to_diffusers, unet_config, unet_modules, vae_config
from utils.errors import UserError
from utils.files import keep_old_version
from utils.images import save_png
from utils.pretrained import load_pretrained
from utils.settings import load_config

DDIM_50 = ("sampling.sampler=ddim", "sampling.steps=50", "sampling.x0_clamp=none")


def export_folder(experiment: Experiment, name: str):
    return experiment.run_dir / name / "diffusers"


def sampled_images(experiment: Experiment, *overrides: str) -> np.ndarray:
    """uint8 (6, H, W, 3) by infer.py."""
    assert experiment.run("infer", *DDIM_50, "sampling.num_images=6", "sampling.save_images=true", *overrides) == 0
    files = sorted((experiment.folder / "results").rglob("00000?.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.mark.parametrize("overrides", [
    ["diffusion.schedule=cosine"],
    ["diffusion.schedule=linear", "diffusion.prediction=v"],
    ["diffusion.schedule=scaled_linear", "diffusion.prediction=x0"],
    ["diffusion.schedule=cosine", "diffusion.prediction=v", "encodings.normalization=per_channel"],
])  # fmt: skip
def test_pipeline_of_the_export_gives_the_same_images(experiment, overrides):
    overrides = [*overrides, "diffusion.name=m", "vae.steps=30", "diffusion.steps=30"]
    experiment.train_all(*overrides)
    expected = sampled_images(experiment, *overrides)
    assert experiment.run("export", *overrides) == 0
    pipeline = DiffusionPipeline.from_pretrained(export_folder(experiment, "m"))
    generators = image_generators(0, range(6), "cpu")
    images = pipeline(batch_size=6, generator=generators, num_inference_steps=50, output_type="np").images
    assert expected.std() > 5
    assert np.abs((images * 255).round() - expected).max() <= 1


def test_class_conditional_export_has_components_and_a_card(experiment):
    overrides = ["diffusion.name=m", "diffusion.condition=class", "diffusion.labels=[hat]"]
    experiment.train_all(*overrides)
    assert experiment.run("infer", *overrides) == 0
    results = experiment.folder / "results"
    fingerprint = Image.open(results / "tiny_m_ddim_2x3.png").text["unet_fingerprint"]
    old = PngInfo()
    old.add_itxt("unet_fingerprint", "0123")
    Image.new("RGB", (8, 8)).save(results / "tiny_m_ddim_2x3-2.png", pnginfo=old)  # of older weights
    Image.new("RGB", (8, 8)).save(results / "tiny_m_a_ddim_2x3.png")  # of the U-Net m_a
    (results / "tiny_m_a_ddim4_generation.md").write_text("# Report of another U-Net\n\nU-Net at step 6 (0123)")
    (results / "tiny_m_ddim4_generation.md").write_text(f"# Report of this U-Net\n\nU-Net at step 6 ({fingerprint})")
    assert experiment.run("export", *overrides) == 0
    folder = export_folder(experiment, "m")
    card = (folder / "README.md").read_text()
    assert "![tiny_m_ddim_2x3](samples.png)" in card
    assert "## Report of this U-Net" in card and "another U-Net" not in card
    assert not (folder / "model_index.json").exists()
    assert UNet2DModel.from_pretrained(folder, subfolder="unet").config.num_class_embeds == 4
    assert AutoencoderKL.from_pretrained(folder, subfolder="vae").config.scaling_factor > 0
    card = (folder / "README.md").read_text()
    assert "0 no, 1 beanie, 2 sun hat; 3: no label" in card and "samples.png" in card and (folder / "samples.png").is_file()

    shutil.rmtree(experiment.run_dir / "m")
    retrained = [*overrides, "diffusion.lr=1e-3"]
    assert experiment.run("train_diffusion", *retrained) == 0 and experiment.run("export", *retrained) == 0
    assert "samples.png" not in (folder / "README.md").read_text() and not (folder / "samples.png").exists()


def test_card_leaves_out_files_of_other_weights(tmp_path):
    """Another U-Net whose name starts the same; the same U-Net and VAE before they were trained again."""
    results, folder = tmp_path / "results", tmp_path / "diffusers"
    folder.mkdir()
    config = load_config(None, [f"results_dir={results}", "name=tiny", "diffusion.name=m"])
    model = SimpleNamespace(checkpoint=SimpleNamespace(fingerprint="new", metadata={"vae_fingerprint": "newvae"}))

    def write_grid(name: str, color: str, settings: dict) -> None:
        save_png(Image.new("RGB", (4, 4), color), results / f"{name}.png", settings)

    def write(name: str, fingerprint: str) -> None:
        origin = weights_origin("U-Net", fingerprint, {"step": 1})
        write_report(config, name, torch.device("cpu"), origin, f"# {name}, {fingerprint}")

    write_grid("tiny_m_a_ddim_2x3", "red", {"unet_fingerprint": "other"})
    write_grid("tiny_m_ddim_2x3", "blue", {"unet_fingerprint": "old"})
    write_grid("tiny_m_ddim_2x3_strip", "blue", {})
    (results / "tiny_m_ddim_1x1.png").write_bytes(b"damaged")
    for name, fingerprint in (
        ("tiny_m_a_ddim4_generation", "other"), ("tiny_m_ddim4_generation", "old"), ("tiny_reconstruction", "oldvae"),
    ):  # fmt: skip
        write(name, fingerprint)
    assert sample_section(config, model, folder) == report_sections(config, model) == []

    keep_old_version(results, "tiny_m_ddim_2x3", (".png",))
    write_grid("tiny_m_ddim_2x3", "lime", {"unet_fingerprint": "new"})
    write("tiny_m_unipc25_generation", "new")
    write("tiny_reconstruction", "newvae")
    assert "![tiny_m_ddim_2x3]" in sample_section(config, model, folder)[0]
    assert Image.open(folder / "samples.png").getpixel((0, 0)) == (0, 255, 0)
    titles = [section.splitlines()[0] for section in report_sections(config, model)]
    assert titles == ["## tiny_m_unipc25_generation, new", "## tiny_reconstruction, newvae"]


def sigma_max_for(num_timesteps: int) -> float:
    """Return a sigma_max that leaves this number of timesteps of the cosine schedule."""
    schedule, last = make_schedule("cosine"), torch.tensor(num_timesteps - 1)
    return 1.0001 * float(schedule.sigma(last) / schedule.alpha(last))


@pytest.mark.parametrize("num_timesteps", [30, 252, 254, 990, 996, 1000])
def test_scheduler_takes_the_same_timesteps(num_timesteps):
    sigma_max, steps = sigma_max_for(num_timesteps), min(50, num_timesteps)
    name, arguments = scheduler_config(make_schedule("cosine"), "eps", sigma_max)
    assert (name == "DDIMScheduler") == (num_timesteps == 1000)
    scheduler = {"DDIMScheduler": DDIMScheduler}.get(name, DPMSolverMultistepScheduler)(**arguments)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(make_schedule("cosine"), steps, sigma_max=sigma_max)


@pytest.mark.parametrize("num_timesteps", [253, 987, 995])
def test_numbers_of_timesteps_with_an_extra_step_are_refused(num_timesteps):
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=num_timesteps, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == 51 and int(scheduler.timesteps[-1]) == -1
    with pytest.raises(ValueError, match=f"with {num_timesteps} usable timesteps.*sampling.sigma_max"):
        scheduler_config(make_schedule("cosine"), "eps", sigma_max_for(num_timesteps))


@pytest.mark.parametrize("overrides, message", [
    (["diffusion.bottleneck=transformer"], "bottleneck=transformer"),
    (["diffusion.condition=class"], "one label per image"),
    (["diffusion.schedule=flow", "diffusion.prediction=velocity"], "prediction=velocity"),
    (["diffusion.schedule=flow", "diffusion.prediction=v"], "schedule=flow"),
    (["vae.patch_size=2", "vae.channels=[8]"], "patch_size=2"),
    (["vae.output_activation=tanh"], "output_activation=tanh"),
])  # fmt: skip
def test_models_that_diffusers_cannot_express_are_refused_in_one_line(experiment, capsys, overrides, message):
    overrides = ["diffusion.name=m", "vae.steps=1", "diffusion.steps=1", *overrides]
    experiment.train_all(*overrides)
    assert experiment.run("export", *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not export_folder(experiment, "m").exists()


def test_a_wrong_argument_is_noticed(experiment, monkeypatch, capsys):
    """The number of norm groups loads without an error, so the export compares outputs."""
    import export

    experiment.train_all("diffusion.name=m", "vae.steps=30", "diffusion.steps=30")
    monkeypatch.setattr(export, "unet_config", lambda settings: unet_config(settings) | dict(norm_num_groups=1))
    assert experiment.run("export", "diffusion.name=m") == 2
    assert "does not reproduce" in capsys.readouterr().err
    assert not export_folder(experiment, "m").exists()


# Starting from given weights


@pytest.fixture
def sd_vae(tmp_path):
    """A small random AutoencoderKL with quant convolutions, saved by diffusers."""
    torch.manual_seed(0)
    settings = VAE(channels=[8, 16], num_res_blocks=1, latent_channels=4, attention=True, quant_conv=True).settings
    vae = AutoencoderKL(**vae_config(settings, 16, scaling_factor=0.5)).eval()
    vae.save_pretrained(tmp_path / "sd_vae")
    return vae, tmp_path / "sd_vae"


def test_pretrained_vae_without_training_is_used_as_it_is(experiment, sd_vae):
    reference, folder = sd_vae
    overrides = [f"vae.init_from={folder}", "vae.steps=0"]
    experiment.train_all(*overrides)
    assert experiment.run("infer", *overrides) == 0
    ours = load_pretrained("vae", str(experiment.run_dir / "vae" / "vae.safetensors"), "vae.init_from")
    vae = VAE(**ours.settings)
    vae.load_state_dict(ours.state)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(vae.encode(images).mean, reference.encode(images).latent_dist.mean, atol=1e-5)
    assert (experiment.run_dir / "vae" / "reconstructions.png").is_file()
    lines = [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/psnr" in line for line in lines)


def test_pretrained_vae_is_fine_tuned(experiment, sd_vae):
    _, folder = sd_vae
    start = load_pretrained("vae", str(folder), "vae.init_from").state
    assert experiment.run("train_vae", f"vae.init_from={folder}", "vae.steps=4", "vae.lr=1e-5") == 0
    tuned = load_file(experiment.run_dir / "vae" / "vae.safetensors")
    changes = [float((tuned[name] - value).abs().max()) for name, value in start.items()]
    assert 0 < max(changes) < 1e-3


def test_a_pipeline_folder_and_old_attention_names_load(sd_vae, tmp_path):
    _, folder = sd_vae
    expected = load_pretrained("vae", str(folder), "vae.init_from").state
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    weights = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value"}
    state = {}
    for name, value in load_file(weights).items():
        parts = [old.get(part, part) for part in name.replace("to_out.0", "proj_attn").split(".")]
        state[".".join(parts)] = value
    save_file(state, weights)
    assert any(".query." in name for name in state)
    loaded = load_pretrained("vae", str(tmp_path / "pipeline"), "vae.init_from").state
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_unet_from_a_file_and_from_diffusers(experiment, tmp_path):
    experiment.train_all()
    trained = experiment.run_dir / "cosine" / "unet.safetensors"
    same = ["diffusion.name=tuned", f"diffusion.init_from={trained}", "diffusion.steps=1", "diffusion.lr=1e-9"]
    assert experiment.run("train_diffusion", *same) == 0
    tuned, start = load_file(experiment.run_dir / "tuned" / "unet.safetensors"), load_file(trained)
    assert all(torch.allclose(tuned[name], value, atol=1e-6) for name, value in start.items())

    assert experiment.run("export") == 0
    exported = ["diffusion.name=imported", f"diffusion.init_from={export_folder(experiment, 'cosine')}", *same[2:]]
    assert experiment.run("train_diffusion", *exported) == 0
    imported = load_file(experiment.run_dir / "imported" / "unet.safetensors")
    assert all(torch.allclose(imported[name], value, atol=1e-6) for name, value in start.items())


def test_a_changed_number_of_classes_resets_the_label_table(experiment, capsys):
    experiment.train_all("diffusion.condition=class", "diffusion.labels=[hat]")
    trained = experiment.run_dir / "cosine" / "unet.safetensors"
    other = [
        "diffusion.name=other",
        f"diffusion.init_from={trained}",
        "diffusion.condition=class",
        "diffusion.labels=[smile]",
    ]
    assert experiment.run("train_diffusion", *other, "diffusion.steps=1", "diffusion.lr=1e-9") == 0
    assert "initialized randomly: conditioner.table.weight" in capsys.readouterr().out
    tuned, start = load_file(experiment.run_dir / "other" / "unet.safetensors"), load_file(trained)
    assert tuned["conditioner.table.weight"].shape[0] == 3
    assert torch.allclose(tuned["conv_in.weight"], start["conv_in.weight"], atol=1e-6)


def test_a_class_conditional_unet_comes_back_from_diffusers(tmp_path):
    names = {"class": [str(i) for i in range(5)]}
    kwargs = dict(in_channels=4, size=8, channels=[8, 16], num_res_blocks=1, attn_resolutions=[4], head_channels=16)
    unet = UNet(**kwargs, conditioning={"kind": "labels", "names": names})
    reference = UNet2DModel(**unet_config(unet.settings))
    reference.load_state_dict(to_diffusers(unet.state_dict(), unet_modules(unet.settings)))
    reference.save_pretrained(tmp_path / "unet")
    pretrained = load_pretrained("unet", str(tmp_path / "unet"), "diffusion.init_from")
    assert pretrained.settings["conditioning"]["names"] == names
    assert all(torch.equal(pretrained.state[name], value) for name, value in unet.state_dict().items())


def one_error_line(experiment: Experiment, capsys, stage: str, *overrides: str) -> str:
    capsys.readouterr()
    assert experiment.run(stage, *overrides) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_initial_weights_give_one_line_and_write_nothing(experiment, sd_vae, tmp_path, capsys):
    _, folder = sd_vae

    def refuse(source, message: str, *overrides: str) -> None:
        assert message in one_error_line(experiment, capsys, "train_vae", f"vae.init_from={source}", *overrides)
        assert not (experiment.run_dir / "vae").exists()

    refuse("nobody/no-such-model", "cannot be loaded from the Hugging Face hub")
    refuse(tmp_path / "missing" / "folder", "does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "has no config.json")
    refuse(folder, "must be a multiple of 2", "data.image_size=17")
    unet = UNet2DModel(
        **unet_config(UNet(in_channels=4, size=8, channels=[8], num_res_blocks=1, attn_resolutions=[]).settings)
    )
    unet.save_pretrained(tmp_path / "unet")
    refuse(tmp_path / "unet", "UNet2DModel, not AutoencoderKL")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_num_groups": 1}))
    refuse(folder, "norm_num_groups")
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 3}))
    refuse(folder, "do not fit")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    refuse(folder, "cannot be used")
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 100)
    refuse(tmp_path / "weights.safetensors", "damaged")


def test_bad_initial_unets_give_one_line(trained, experiment, capsys):
    weights = trained.run_dir / "cosine" / "unet.safetensors"
    experiment.train_all("vae.latent_channels=2", "diffusion.steps=1", "vae.steps=1")
    base = ("vae.latent_channels=2", "vae.steps=1", "diffusion.name=other", f"diffusion.init_from={weights}")
    assert "takes latents of 8x8x4" in one_error_line(experiment, capsys, "train_diffusion", *base)
    assert not (experiment.run_dir / "other").exists()
    with pytest.raises(UserError, match="is not a vae"):
        load_pretrained("vae", str(weights), "vae.init_from")


def test_a_unet_of_another_prediction_is_refused(trained, capsys):
    weights = trained.run_dir / "cosine" / "unet.safetensors"
    other = ("diffusion.name=other", f"diffusion.init_from={weights}", "diffusion.prediction=v")
    assert "diffusion.prediction must be eps, because" in one_error_line(trained, capsys, "train_diffusion", *other)
