"""Typed settings of an experiment. Does not import torch, so that --help is fast."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

MIN_DISCRIMINATOR_SIZE = 24  # pixels; PatchDiscriminator has no output for smaller images
MIN_PERCEPTUAL_SIZES = {"vgg": 16, "alex": 31, "squeeze": 17, "vgg19": 4}  # pixels; smaller images have empty feature maps


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def setting(default: Any, help: str) -> Any:
    return Field(default, description=help)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]  # part of file names
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
ChannelsPerLevel = Annotated[list[Annotated[int, Field(ge=4, multiple_of=4)]], Field(min_length=1)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
FeatureName = Literal["inception", "dinov2", "clip", "efficientnet_lite0", "mobilenet_v2"]


def check_image_size(value: Any) -> Any:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 8 <= side <= 4096 for side in sides):
        raise ValueError("must be a number from 8 to 4096, or two as [height, width]")
    return value


class DataConfig(Section):
    source: Literal["synthetic_faces", "folder", "huggingface", "celeba", "cifar10", "coco"] = setting(
        "celeba",
        "image source; synthetic_faces: procedural portraits, no files; folder: any folder or zip of images; huggingface: "
        "the datasets library",
    )
    path: Optional[PathText] = setting(
        None,
        "folder or zip of the images; huggingface: hub id, folder or file (parquet, arrow, imagefolder); cifar10: folder "
        "that contains cifar-10-batches-py; with data.download=true: folder to download into",
    )
    subset: Optional[str] = setting(None, "huggingface: name of the dataset's configuration, if it has several")
    split: Optional[str] = setting(
        None,
        "huggingface: use only this split, for example train or train[:5000]; default: use the dataset's splits train, "
        "validation and test",
    )
    image_column: Optional[str] = setting(None, "huggingface: column of the images; default: the only column of type Image")
    label_column: Optional[str] = setting(
        None,
        "column with class labels; default for huggingface: all columns of type ClassLabel; default for folder: all other "
        "columns of the metadata files, if they have few different values",
    )
    caption_column: Optional[str] = setting(
        None,
        "column with captions; default: for each image, the first of captions, caption, text and prompt that is not empty",
    )
    value_range: Optional[Annotated[list[float], Field(min_length=2, max_length=2)]] = setting(
        None,
        "[black, white]: values of 16-bit, 32-bit and float images that become black and white; default: [0, 65535] for "
        "16 bits, [0, 1] for float",
    )
    download: bool = setting(False, "celeba, cifar10: download with torchvision into data.path")
    channels: Literal[1, 3, 4] = setting(
        3,
        "1: grayscale; 3: RGB; 4: RGBA, only for folder and huggingface. Without RGBA, transparent images get a white "
        "background",
    )
    image_size: Annotated[Union[int, list[int]], BeforeValidator(check_image_size)] = setting(
        64, "size of the training images in pixels: a number for squares, or [height, width]"
    )
    crop: Literal["auto", "ddim", "center140", "center"] = setting(
        "auto",
        "crop before resizing; ddim: CelebA's 128x128 box of Song et al. 2021; center140: CelebA's central 140x140 box; "
        "center: largest centered box with the aspect ratio of image_size; auto: ddim for celeba, center for other sources",
    )
    val_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = setting(
        0.05, "fraction of the images used for validation if the source has no validation split of its own"
    )
    max_train_images: Optional[Annotated[int, Field(ge=8)]] = setting(
        None, "use at most this many training images, spread evenly over the source; default: all"
    )
    num_images: Annotated[int, Field(ge=8)] = setting(
        10000, "synthetic_faces: number of training images; val_fraction · num_images validation images are added"
    )
    flip: bool = setting(True, "also train on horizontally mirrored images")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def size_text(self) -> str:
        """Size for messages: "64" for squares, else height x width, such as "48x64"."""
        height, width = self.size
        return f"{height}" if height == width else f"{height}x{width}"

    @property
    def crop_name(self) -> str:
        """data.crop, or the crop that "auto" selects."""
        return self.crop if self.crop != "auto" else "ddim" if self.source == "celeba" else "center"


class PerceptualConfig(Section):
    net: Literal["none", "vgg", "alex", "squeeze", "vgg19", "efficientnet_lite0"] = setting(
        "vgg",
        "perceptual loss; vgg, alex, squeeze: LPIPS (Zhang et al. 2018) with this backbone; vgg19, efficientnet_lite0: "
        "like LPIPS, but without its learned linear layers; efficientnet_lite0 needs no download; none: off",
    )
    weight: Weight = setting(1.0, "weight of the perceptual loss; 0: off")
    fraction: Annotated[float, Field(gt=0, le=1)] = setting(
        1.0,
        "fraction of each batch that the perceptual loss is computed on, at least one image; with a large network such as "
        "VGG19, a smaller fraction allows more steps in the same time",
    )
    weights: Optional[PathText] = setting(
        None,
        "local file with the ImageNet weights of the backbone; default: torchvision's cache, else download; for "
        "efficientnet_lite0, its pip package",
    )


class AdversarialConfig(Section):
    weight: Weight = setting(
        0.0, "weight of the adversarial loss, multiplied by the adaptive weight of Esser et al. 2021, eq. 7; 0: off"
    )
    start: Count = setting(20000, "step at which the adversarial loss starts")
    width: Annotated[int, Field(ge=8)] = setting(64, "channels of the discriminator's first layer")
    lr: PositiveFloat = setting(2e-4, "learning rate of the discriminator, constant")


class TrainingConfig(Section):
    """Settings shared by both training scripts."""

    steps: PositiveInt = setting(20000, "total number of optimizer steps")
    max_minutes: Optional[PositiveFloat] = setting(
        None, "stop after this many minutes of training, summed over resumed runs, even if steps are left"
    )
    batch_size: PositiveInt = setting(64, "images per optimizer step, over all GPUs")
    micro_batch: Union[Literal["auto"], PositiveInt] = setting(
        "auto",
        "images per forward and backward pass of each GPU, with gradient accumulation; auto: start with the GPU's "
        "share of the batch and halve it until it fits in memory",
    )
    grad_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about one more forward pass per step"
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: Muon (Jordan et al. 2024) for the weights of linear layers and convolutions that map features to features, "
        "AdamW for the other parameters; learns more per step, and needs a higher lr, about 2e-3",
    )
    lr: PositiveFloat = setting(2e-4, "learning rate after warm-up")
    lr_decay: Literal["none", "cosine"] = setting(
        "none", "cosine: decay to lr/10 at the last step or at max_minutes, whichever comes first"
    )
    warmup: Count = setting(500, "steps of linear learning rate warm-up")
    weight_decay: Weight = setting(0.0, "decoupled weight decay")
    grad_clip: PositiveFloat = setting(1.0, "maximum gradient norm")
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = setting(
        0.999, "EMA decay of the weights, min(ema_decay, (1+n)/(10+n)) at step n; 0: off"
    )
    log_every: PositiveInt = setting(50, "steps between entries in metrics.jsonl, TensorBoard and the tracker")
    eval_every: PositiveInt = setting(
        1000, "steps between evaluations on validation data, with a grid of reconstructions or samples"
    )
    save_minutes: PositiveFloat = setting(5.0, "minutes between saves of weights and training state")


class VAEConfig(TrainingConfig):
    steps: Count = setting(20000, "total number of optimizer steps; 0 uses the weights of init_from without training")
    init_from: Optional[PathText] = setting(
        None,
        "weights to start from: a vae.safetensors, or a diffusers AutoencoderKL as a folder or Hugging Face hub id; it also "
        "defines the architecture, so channels, num_res_blocks, attention, patch_size, latent_channels and "
        "output_activation are ignored",
    )
    retrain: bool = setting(
        False,
        "train even if encodings.pt and U-Nets exist; they become invalid, because they belong to the current VAE weights",
    )
    channels: ChannelsPerLevel = setting(
        [64, 64, 128], "channels per resolution level; downsampling factor f = patch_size · 2^(levels-1)"
    )
    num_res_blocks: PositiveInt = setting(1, "residual blocks per level")
    attention: bool = setting(True, "self-attention at the lowest resolution")
    patch_size: PositiveInt = setting(1, "fold patch_size x patch_size pixels into channels before the first level")
    latent_channels: PositiveInt = setting(8, "channels of the latent")
    output_activation: Literal["none", "tanh"] = setting("none", "tanh: limit the decoder's output to [-1, 1]")
    reconstruction: Literal["mse", "l1"] = setting("mse", "reconstruction loss, mean over pixels and channels")
    kl_weight: Weight = setting(
        1e-6, "weight of the KL loss, which is in nats, averaged over latent dimensions (LDM uses the sum)"
    )
    kl_warmup: Count = setting(0, "steps of linear kl_weight warm-up")
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()

    @property
    def perceptual_images(self) -> int:
        """Number of images of each batch that the perceptual loss is computed on."""
        return max(1, int(self.perceptual.fraction * self.batch_size))

    @property
    def downsampling(self) -> int:
        return self.patch_size * 2 ** (len(self.channels) - 1)


class EncodingsConfig(Section):
    batch_size: PositiveInt = setting(256, "images per encoder pass, and captions per text encoder pass")
    normalization: Literal["global", "per_channel"] = setting(
        "global",
        "global: scale all latents by 1/std of all values, no shift; per_channel: zero mean and unit std per channel",
    )
    dtype: Literal["float16", "bfloat16"] = setting("float16", "storage type of the latents")


class TextConfig(Section):
    encoder: Literal["none", "pretrained", "words"] = setting(
        "none",
        "caption encoder; pretrained: frozen CLIP, T5, BERT-like or other text encoder, embeddings cached by "
        "create_encodings.py; words: small transformer over words, trained with the U-Net",
    )
    model: PathText = setting(
        "openai/clip-vit-base-patch32",
        "pretrained: name on the Hugging Face hub, local folder, or PACKAGE:FOLDER inside an installed Python package",
    )
    width: Annotated[int, Field(ge=8, multiple_of=8)] = setting(128, "words: channels of a token")
    layers: PositiveInt = setting(2, "words: number of transformer blocks")
    max_words: PositiveInt = setting(32, "words: maximum caption length; longer captions are cut")


class DiffusionConfig(TrainingConfig):
    init_from: Optional[PathText] = setting(
        None,
        "weights to start from: a unet.safetensors, or a diffusers UNet2DModel as a folder or Hugging Face hub id; it also "
        "defines the architecture",
    )
    name: Optional[Name] = setting(
        None, "name of this U-Net; its folder is <runs_dir>/<name>/<diffusion.name>; default: the schedule's name"
    )
    schedule: Literal["linear", "cosine", "scaled_linear", "flow"] = setting(
        "cosine",
        "noise schedule; linear: Ho et al. 2020; cosine: Nichol & Dhariwal 2021; scaled_linear: LDM; "
        "flow: rectified flow, usually with prediction=velocity",
    )
    timesteps: Annotated[int, Field(ge=2)] = setting(1000, "number of timesteps T")
    prediction: Literal["eps", "v", "x0", "velocity"] = setting(
        "eps", "prediction target: noise, v (Salimans & Ho 2022), clean latent, or the velocity eps - z of rectified flow"
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = setting(
        "uniform", "distribution of training timesteps; logit_normal: more near T/2 (Esser et al. 2024, §3.1)"
    )
    weighting: Literal["none", "min_snr"] = setting("none", "loss weight per timestep; min_snr: Hang et al. 2023")
    min_snr_gamma: PositiveFloat = setting(5.0, "min_snr: gamma, the upper limit of the SNR in the loss weight")
    channels: ChannelsPerLevel = setting(
        [128, 256, 320], "channels per resolution level; every level after the first halves the resolution"
    )
    num_res_blocks: PositiveInt = setting(2, "residual blocks per level")
    attn_resolutions: list[PositiveInt] = setting(
        [8], "resolutions with self-attention (longer side of the U-Net's feature maps); the bottleneck always has it"
    )
    head_channels: PositiveInt = setting(64, "minimum number of channels per attention head")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = setting(0.1, "dropout in residual blocks")
    condition: Literal["none", "class", "text"] = setting(
        "none", "conditioning; class: labels of the images; text: captions, see text.encoder"
    )
    labels: Optional[list[str]] = setting(None, "class: names of the labels to condition on; default: all labels")
    cfg_dropout: Fraction = setting(
        0.1, "probability of replacing a condition by the null condition in training, for classifier-free guidance"
    )
    cross_attn_resolutions: list[PositiveInt] = setting(
        [], "text: resolutions with cross-attention to the caption (longer side of the U-Net's feature maps)"
    )
    bottleneck: Literal["residual", "transformer"] = setting(
        "residual", "middle block of the U-Net; residual: residual blocks and attention; transformer: adaLN-Zero blocks"
    )
    bottleneck_blocks: PositiveInt = setting(4, "transformer: number of blocks")
    snapshot_every: Optional[PositiveInt] = setting(
        None, "steps between copies of the weights in snapshots/, for sampling.autoguidance; default: no copies"
    )
    sample_images: PositiveInt = setting(36, "images in the sample grid during training (unipc, 20 steps, fixed noise)")


SamplerName = Literal["ancestral", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]


class SamplingConfig(Section):
    sampler: SamplerName = setting(
        "unipc",
        "ancestral: DDPM, Ho et al. 2020; ddim: Song et al. 2021; euler, heun: Karras et al. 2022; dpmpp_2m, "
        "dpmpp_2m_sde: Lu et al. 2022; unipc: Zhao et al. 2023",
    )
    steps: PositiveInt = setting(
        25, "solver steps, at most diffusion.timesteps; one network evaluation per step, two for heun"
    )
    eta: Fraction = setting(0.0, "ddim: added noise, from 0 (deterministic) to 1 (as ancestral)")
    order: Annotated[int, Field(ge=1, le=3)] = setting(2, "unipc: order of the solver")
    variance: Literal["posterior", "beta"] = setting("posterior", "ancestral: variance of the added noise")
    spacing: Literal["auto", "trailing", "leading", "linspace", "logsnr", "karras"] = setting(
        "auto",
        "timestep spacing; trailing, leading, linspace: uniform in t; logsnr: uniform in log(alpha/sigma); karras: Karras "
        "et al. 2022; auto: logsnr for heun, dpmpp_2m, dpmpp_2m_sde and unipc, trailing for other samplers and for flow",
    )
    sigma_max: Optional[PositiveFloat] = setting(
        None,
        "start at the noisiest timestep with sigma/alpha up to this; default: 70 for cosine, 1000 for flow, else no limit",
    )
    x0_clamp: Union[Literal["range", "none"], PositiveFloat] = setting(
        "range",
        "clamp the clean estimate; range: to the range of the training latents in each channel; none: off; a number c: to "
        "[-c, c]; 1.0 is too small for latents of unit variance",
    )
    clean_finish_steps: Count = setting(
        0, "ancestral, dpmpp_2m_sde, ddim with eta > 0: number of last steps that add no noise"
    )
    seed: Seed = setting(0, "seed of the noise; image i depends only on the seed and i")
    guidance: Weight = setting(
        1.0, "guidance scale w in uncond + w (cond - uncond); 1: off, 0: unconditional, above 1: stronger conditioning"
    )
    guidance_interval: Optional[Annotated[list[Weight], Field(min_length=2, max_length=2)]] = setting(
        None, "[low, high]: use guidance only if sigma/alpha is in this range (Kynkäänniemi et al. 2024); default: always"
    )
    guidance_rescale: Fraction = setting(
        0.0, "rescale guided estimates toward the std of the conditional estimates (Lin et al. 2024); 0: off, 1: fully"
    )
    autoguidance: Optional[PathText] = setting(
        None,
        "weights file of a snapshot or a smaller U-Net; guidance moves away from its estimate instead of the unconditional "
        "estimate (Karras et al. 2024)",
    )
    labels: Optional[Annotated[list[Union[str, dict[str, str]]], Field(min_length=1)]] = setting(
        None,
        "class: one grid row per entry. For a model with one label, an entry is a value: [0, cat]. For several labels, an "
        "entry is a mapping: [{hat: beanie, glasses: yes}]. Default for one label: all its values, at most sampling.rows; "
        "default for several labels: no condition",
    )
    prompts: Optional[Annotated[list[str], Field(min_length=1)]] = setting(
        None, "text: one grid row per caption; default: no condition"
    )
    slerp_to: Optional[Seed] = setting(
        None, "second seed: each row interpolates from the noise of sampling.seed to the noise of this seed"
    )
    image: Optional[PathText] = setting(None, "image-to-image: path of the initial image, in the model's image size")
    strength: Optional[Annotated[float, Field(gt=0.0, le=1.0)]] = setting(
        None, "image-to-image: fraction of the steps to run; 1: start from pure noise; default: 0.6, or 1 with a mask"
    )
    mask: Optional[PathText] = setting(None, "inpainting: path of an image that is white where sampling.image is replaced")
    rows: PositiveInt = setting(10, "rows of the grid; labels and prompts override it")
    cols: PositiveInt = setting(10, "columns of the grid")
    num_images: Optional[PositiveInt] = setting(
        None, "number of images; default: rows · cols; more than rows · cols requires save_images"
    )
    batch_size: PositiveInt = setting(100, "images per sampling batch")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "float32", "float32: images do not depend on the batch size; auto: bfloat16 if the hardware supports it, faster"
    )
    trajectory_frames: Count = setting(
        0, "number of frames in a strip and a GIF that show the clean estimates of the first images during sampling; 0: off"
    )
    save_images: bool = setting(False, "also save every image as a PNG file")


class EvaluationConfig(Section):
    task: Literal["samplers", "reconstruction", "generation", "condition", "latents", "loss"] = setting(
        "generation", "what evaluate.py measures; evaluate.py --help describes the tasks"
    )
    num_images: Annotated[int, Field(ge=8)] = setting(
        256, "number of images to evaluate: validation images, and generated images for generation and samplers"
    )
    num_generated: Optional[Annotated[int, Field(ge=8)]] = setting(
        None,
        "generation: number of generated images, default: num_images; a Fréchet distance needs more images than features "
        "(2,048 for Inception)",
    )
    num_reference: Annotated[int, Field(ge=8)] = setting(
        10000, "generation: maximum number of training images to compare with"
    )
    features: Annotated[list[FeatureName], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = setting(
        ["inception"],
        "feature networks, one name or a list; generation, condition, reconstruction and latents report distances for each "
        "network. Distances of different networks cannot be compared. efficientnet_lite0 needs no download. With [], "
        "reconstruction and latents report no distances; generation and condition need at least one network",
    )
    weights: Union[None, PathText, dict[FeatureName, PathText]] = setting(
        None,
        "weights of the feature networks, as {network: path} or, for a single network, the path; dinov2, clip: a local "
        "folder or Hugging Face hub id; other networks: a local file; default: download",
    )
    guidance: Annotated[list[Weight], Field(min_length=1)] = setting(
        [0.0, 1.0, 3.0, 7.0], "condition: guidance scales to compare; 0: without condition"
    )
    samplers: Annotated[list[SamplerName], Field(min_length=1)] = setting(
        list(get_args(SamplerName)), "samplers: which samplers to compare"
    )
    steps: Annotated[list[PositiveInt], Field(min_length=1)] = setting(
        [5, 10, 20, 50, 100, 1000], "samplers: numbers of steps to compare"
    )
    batch_size: PositiveInt = setting(128, "images per network pass")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "auto: bfloat16 if the hardware supports it, else float32; the task latents always uses float32"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "EvaluationConfig":
        if isinstance(self.weights, str) and len(self.features) != 1:
            raise ValueError(
                f"evaluation.weights must be a mapping such as {{dinov2: FOLDER}} for {len(self.features)} networks "
                f"(got {self.weights})"
            )
        unused = [name for name in self.weights if name not in self.features] if isinstance(self.weights, dict) else []
        if unused:
            raise ValueError(f"evaluation.weights names {', '.join(unused)}, which evaluation.features does not contain")
        return self

    def weights_of(self, network: str) -> str | None:
        return self.weights.get(network) if isinstance(self.weights, dict) else self.weights


class LoggingConfig(Section):
    tensorboard: bool = setting(True, "log scalars and images to TensorBoard")
    tracker: Literal["none", "wandb", "trackio"] = setting(
        "none", "experiment tracker to log to, Weights & Biases or Trackio; its package must be installed"
    )


class Config(Section):
    name: Name = setting("celeba64", "name of the experiment; its files are in <runs_dir>/<name>")
    seed: Seed = setting(0, "seed of training and of the synthetic_faces images")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = setting(
        "auto", "auto, cpu, mps, cuda or cuda:N; auto: cuda if available, else mps, else cpu"
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "precision of training and encoding; auto: bfloat16 autocast if the hardware supports it, else float32"
    )
    compile: Union[Literal["auto"], bool] = setting(
        "auto", "torch.compile; auto: on CUDA, compile networks in training only, and sample with a CUDA graph"
    )
    runs_dir: PathText = setting("runs", "folder for weights, encodings, logs and the image cache")
    results_dir: PathText = setting("results", "folder for image grids and reports of evaluate.py")
    data: DataConfig = DataConfig()
    vae: VAEConfig = VAEConfig()
    encodings: EncodingsConfig = EncodingsConfig()
    text: TextConfig = TextConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def diffusion_name(self) -> str:
        return self.diffusion.name or self.diffusion.schedule

    # Checks that involve several keys. pydantic adds no key to their error messages, so the messages name the keys.

    @model_validator(mode="after")
    def _check_names(self) -> "Config":
        if self.name == "cache":
            raise ValueError("name must not be 'cache', the folder of the image cache")
        if self.diffusion_name in ("vae", "encodings.pt"):
            raise ValueError(f"diffusion.name must not be {self.diffusion_name!r}, which another stage uses")
        return self

    @model_validator(mode="after")
    def _check_data(self) -> "Config":
        cfg, (height, width) = self.data, self.data.size
        for key in ("subset", "split", "image_column", "label_column", "caption_column"):
            sources = ["huggingface", "folder"] if key in ("label_column", "caption_column") else ["huggingface"]
            if getattr(cfg, key) is not None and cfg.source not in sources:
                raise ValueError(f"data.{key} needs data.source={' or '.join(sources)} (got {cfg.source})")
        if cfg.channels == 4 and cfg.source not in ("folder", "huggingface"):
            raise ValueError(
                f"data.channels=4 needs data.source=folder or huggingface: the images of {cfg.source} have no transparency"
            )
        if cfg.source == "synthetic_faces" and (cfg.channels != 3 or height != width or height < 16):
            raise ValueError(
                f"data.source=synthetic_faces needs data.channels=3 and a square data.image_size of at least 16 "
                f"(got {cfg.channels} and {cfg.size_text})"
            )
        if cfg.crop in ("ddim", "center140") and cfg.source in ("cifar10", "synthetic_faces"):
            raise ValueError(f"data.crop={cfg.crop} is for photographs of CelebA (got data.source={cfg.source})")
        if cfg.crop_name in ("ddim", "center140") and height != width:
            raise ValueError(
                f"data.crop={cfg.crop_name} needs a square data.image_size (got {cfg.size_text}): use data.crop=center"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "Config":
        if self.data.value_range and self.data.value_range[0] == self.data.value_range[1]:
            raise ValueError(f"data.value_range must be two different values (got {self.data.value_range})")
        net, shorter_side = self.vae.perceptual.net, min(self.data.size)
        if shorter_side < MIN_PERCEPTUAL_SIZES.get(net, 0):
            raise ValueError(
                f"data.image_size must be at least {MIN_PERCEPTUAL_SIZES[net]} if vae.perceptual.net={net} "
                f"(got {self.data.size_text}): use larger images, or vae.perceptual.net=none"
            )
        if self.vae.adversarial.weight > 0 and shorter_side < MIN_DISCRIMINATOR_SIZE:
            raise ValueError(
                f"data.image_size must be at least {MIN_DISCRIMINATOR_SIZE} if vae.adversarial.weight > 0 "
                f"(got {self.data.size_text})"
            )
        if self.vae.steps == 0 and self.vae.init_from is None:
            raise ValueError("vae.steps must be at least 1 without vae.init_from (got 0)")
        if self.vae.init_from is not None:
            return self  # the downsampling factor is not known before the weights are read
        f, levels = self.vae.downsampling, len(self.diffusion.channels)
        if any(side % f for side in self.data.size):
            raise ValueError(
                f"data.image_size must be a multiple of {f}, the VAE's downsampling factor vae.patch_size · 2^(levels-1) "
                f"(got {self.data.size_text})"
            )
        height, width = (side // f for side in self.data.size)
        if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
            raise ValueError(
                f"diffusion.channels must have fewer levels: latents of {height}x{width} cannot be halved "
                f"{levels - 1} times (got {levels} levels)"
            )
        return self

    @model_validator(mode="after")
    def _check_text(self) -> "Config":
        if self.diffusion.condition != "text":
            return self
        if self.text.encoder == "none":
            raise ValueError("diffusion.condition=text needs text.encoder=pretrained or words (got none)")
        if self.vae.init_from is not None:
            return self  # the resolutions are not known before the weights are read; UNet checks them
        longer_side = max(self.data.size) // self.vae.downsampling
        resolutions = [longer_side >> level for level in range(len(self.diffusion.channels))]
        if not set(resolutions) & set(self.diffusion.cross_attn_resolutions):
            raise ValueError(
                f"diffusion.cross_attn_resolutions must contain at least one of {', '.join(map(str, resolutions))}, the "
                f"U-Net's resolutions, if diffusion.condition=text (got {self.diffusion.cross_attn_resolutions})"
            )
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> "Config":
        cfg, timesteps = self.sampling, self.diffusion.timesteps
        if cfg.steps > timesteps:
            raise ValueError(f"sampling.steps must be at most diffusion.timesteps = {timesteps} (got {cfg.steps})")
        if cfg.clean_finish_steps > cfg.steps:
            raise ValueError(
                f"sampling.clean_finish_steps must be at most sampling.steps = {cfg.steps} (got {cfg.clean_finish_steps})"
            )
        if cfg.labels is not None and cfg.prompts is not None:
            raise ValueError("sampling.labels and sampling.prompts are mutually exclusive: set one of them to null")
        if cfg.mask is not None and cfg.image is None:
            raise ValueError("sampling.mask needs sampling.image")
        if cfg.slerp_to is not None and cfg.image is not None:
            raise ValueError("sampling.slerp_to and sampling.image are mutually exclusive: set one of them to null")
        if cfg.slerp_to is not None and (cfg.sampler in ("ancestral", "dpmpp_2m_sde") or cfg.eta > 0):
            raise ValueError(
                f"sampling.slerp_to needs a sampler without added noise, such as unipc or ddim, and sampling.eta=0 "
                f"(got {cfg.sampler}, eta={cfg.eta:g})"
            )
        return self

    @model_validator(mode="after")
    def _check_guidance(self) -> "Config":
        cfg = self.sampling
        if self.diffusion.condition == "none" and cfg.guidance != 1 and cfg.autoguidance is None:
            raise ValueError(
                f"sampling.guidance must be 1 if diffusion.condition=none (got {cfg.guidance:g}): "
                f"set it to 1, or set sampling.autoguidance to the weights of a weaker U-Net"
            )
        if cfg.guidance_interval is not None and not cfg.guidance_interval[0] < cfg.guidance_interval[1]:
            raise ValueError(f"sampling.guidance_interval must be [low, high] with low < high (got {cfg.guidance_interval})")
        if cfg.guidance == 1:
            for name in ("autoguidance", "guidance_interval", "guidance_rescale"):
                if getattr(cfg, name) not in (None, 0.0):
                    raise ValueError(
                        f"sampling.{name} has no effect if sampling.guidance=1 (off): set it to another scale, such as 2"
                    )
        return self
