"""The schema of an experiment: every key, its type, its default and its meaning. lab/settings.py reads files into it.

Nothing here needs torch, so that --help and a wrong key cost no waiting.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def key(default: Any, meaning: str, **limits) -> Any:
    return Field(default, description=meaning, **limits)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Data(Section):
    source: Literal["synthetic_faces", "folder", "celeba", "cifar10", "coco"] = key("celeba", "where images come from")
    path: Optional[PathText] = key(
        None, "folder or zip of the images; for celeba and cifar10 with download: where to put them"
    )
    download: bool = key(False, "celeba, cifar10: let torchvision download into data.path")
    image_size: Annotated[int, Field(ge=8, le=4096)] = key(64, "pixels; images are square")
    crop: Literal["auto", "ddim", "center140", "square"] = key(
        "auto",
        "ddim: CelebA's 128x128 box of Song et al. 2021; center140: 140x140 box; square: largest centred square; "
        "auto: ddim for celeba, square otherwise",
    )
    holdout: Annotated[float, Field(gt=0.0, lt=0.5)] = key(0.05, "share held out where the source has no split of its own")
    limit: Optional[Annotated[int, Field(ge=8)]] = key(None, "use at most this many training images")
    count: Annotated[int, Field(ge=8)] = key(10000, "synthetic_faces: how many portraits to draw for training")
    flip: bool = key(True, "train on mirrored images too")


class Perceptual(Section):
    net: Literal["none", "vgg", "alex", "squeeze", "vgg19"] = key(
        "vgg",
        "vgg, alex, squeeze: LPIPS (Zhang et al. 2018); vgg19: unit-normalised feature distance up to relu3_1; none: off",
    )
    weight: Annotated[float, Field(ge=0.0)] = key(1.0, "factor of the perceptual term")
    weights: Optional[PathText] = key(
        None, "local file of the backbone's weights; without it torchvision's cache or download"
    )


class Adversarial(Section):
    weight: Annotated[float, Field(ge=0.0)] = key(0.0, "factor of the adversarial term beside its adaptive weight; 0: off")
    start: Count = key(20000, "step at which it begins")
    width: Annotated[int, Field(ge=8)] = key(64, "channels of the discriminator's first layer")
    lr: PositiveFloat = key(2e-4, "learning rate of the discriminator")


class Training(Section):
    """What both training stages share."""

    steps: PositiveInt = key(20000, "optimiser steps in all")
    max_minutes: Optional[PositiveFloat] = key(
        None, "end the stage cleanly after this many minutes of training, all runs together"
    )
    batch_size: PositiveInt = key(64, "images per step")
    micro_batch: Union[Literal["auto"], PositiveInt] = key(
        "auto", "images per forward and backward pass, gradients being summed; auto: halve until it fits the GPU's memory"
    )
    checkpointing: bool = key(False, "recompute activations in the backward pass: less memory for one more forward pass")
    lr: PositiveFloat = key(2e-4, "learning rate of AdamW after warm-up")
    lr_decay: Literal["none", "cosine"] = key("none", "cosine: fall to a tenth of lr at the last step, or at max_minutes")
    warmup: Count = key(500, "steps over which lr rises linearly from 0")
    weight_decay: Annotated[float, Field(ge=0.0)] = key(0.0, "decoupled weight decay of AdamW")
    grad_clip: PositiveFloat = key(1.0, "largest norm of the gradient")
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = key(0.999, "EMA decay, warmed as min(ema, (1+n)/(10+n)); 0: off")
    log_every: PositiveInt = key(50, "steps between log lines")
    eval_every: PositiveInt = key(1000, "steps between held-out evaluations and sample pictures")
    save_minutes: PositiveFloat = key(5.0, "minutes between saves of the full training state")


class Vae(Training):
    widths: Annotated[list[Annotated[int, Field(ge=4, multiple_of=4)]], Field(min_length=1)] = key(
        [64, 112, 128], "channels per level; f = patch · 2^(levels-1)"
    )
    blocks: PositiveInt = key(1, "residual blocks per level")
    attention: bool = key(True, "self-attention at the smallest resolution")
    patch: PositiveInt = key(1, "fold patch×patch pixels into channels before the first level")
    latent_channels: PositiveInt = key(8, "channels of the latent")
    output: Literal["none", "tanh"] = key("none", "tanh bounds the decoder to [-1, 1]")
    reconstruction: Literal["mse", "l1"] = key("mse", "mean over pixels and channels")
    perceptual: Perceptual = Perceptual()
    adversarial: Adversarial = Adversarial()
    kl_weight: Annotated[float, Field(ge=0.0)] = key(
        1e-6, "factor of the KL term in nats per latent dimension (mean over dimensions, not LDM's sum: see README)"
    )
    kl_warmup: Count = key(0, "steps over which kl_weight rises linearly from 0")


class Encodings(Section):
    batch_size: PositiveInt = key(256, "images per encoder pass")
    normalise: Literal["global", "per_channel"] = key(
        "global", "global: shift 0, scale 1/std of all latents; per_channel: zero mean, unit std"
    )
    dtype: Literal["float16", "bfloat16"] = key("float16", "how latents are stored")


class Text(Section):
    encoder: Literal["none", "clip", "words"] = key(
        "none",
        "of captions; clip: a frozen CLIP, cached by create_encodings.py; words: a small transformer, trained with the U-Net",
    )
    model: PathText = key("openai/clip-vit-base-patch32", "clip: its name on the Hugging Face hub, or a local folder")
    width: Annotated[int, Field(ge=8, multiple_of=8)] = key(128, "words: size of a token")
    layers: PositiveInt = key(2, "words: transformer blocks")
    max_words: PositiveInt = key(32, "words: longer captions are cut")


class Diffusion(Training):
    name: Optional[Name] = key(None, "folder of this model under runs/<name>/; default: the schedule's name")
    schedule: Literal["linear", "cosine", "scaled_linear", "flow"] = key(
        "cosine", "noise schedule; flow: rectified flow, with prediction velocity"
    )
    timesteps: Annotated[int, Field(ge=2)] = key(1000, "T")
    prediction: Literal["eps", "v", "x0", "velocity"] = key("eps", "what the network predicts")
    timestep_sampling: Literal["uniform", "logit_normal"] = key(
        "uniform", "which timesteps are trained on; logit_normal: more of the middle ones (Esser et al. 2024, §3.1)"
    )
    weighting: Literal["none", "min_snr"] = key("none", "loss weights over timesteps; min_snr: Hang et al. 2023")
    min_snr_gamma: PositiveFloat = key(5.0, "gamma of min_snr")
    widths: Annotated[list[Annotated[int, Field(ge=4, multiple_of=4)]], Field(min_length=1)] = key(
        [128, 256, 320], "channels per level; each level halves the latent"
    )
    blocks: PositiveInt = key(2, "residual blocks per level")
    attention: list[PositiveInt] = key([8], "latent widths at which there is self-attention")
    head_channels: PositiveInt = key(64, "channels per attention head")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = key(0.1, "dropout inside residual blocks")
    condition: Literal["none", "class", "text"] = key(
        "none", "what a picture is conditioned on: its labels, or its captions"
    )
    labels: Optional[list[str]] = key(None, "class: which kinds of label, where the source has several; default: all")
    cfg_dropout: Share = key(0.1, "share of conditions replaced with the null one, for classifier-free guidance")
    cross_attention: list[PositiveInt] = key([], "text: latent widths at which there is cross-attention to the caption")
    bottleneck: Literal["residual", "transformer"] = key(
        "residual", "the middle of the U-Net; transformer: adaLN-Zero blocks"
    )
    bottleneck_blocks: PositiveInt = key(4, "transformer: how many blocks")
    snapshot_every: Optional[PositiveInt] = key(
        None, "steps between weights files kept in snapshots/, for sampling.autoguidance"
    )
    sample_images: PositiveInt = key(36, "images of the sample picture while training (unipc, 20 steps, fixed noise)")


SamplerName = Literal["ancestral", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]


class Sampling(Section):
    sampler: SamplerName = key(
        "unipc",
        "ancestral: Ho et al. 2020; ddim: Song et al. 2021; euler, heun: Karras et al. 2022; dpmpp_2m and its SDE form: "
        "Lu et al. 2022; unipc: Zhao et al. 2023",
    )
    steps: PositiveInt = key(25, "steps of the solver, at most diffusion.timesteps; one network evaluation each, heun two")
    eta: Share = key(0.0, "ddim: 0 deterministic … 1 ancestral")
    order: Annotated[int, Field(ge=1, le=3)] = key(2, "unipc: order of the solver")
    variance: Literal["posterior", "beta"] = key("posterior", "ancestral: variance of a step")
    spacing: Literal["auto", "trailing", "leading", "linspace", "logsnr", "karras"] = key(
        "auto",
        "which timesteps are visited: even in t, or in log(alpha/sigma), or as Karras et al. 2022; auto: logsnr for heun, dpmpp_2m, its SDE "
        "form and unipc, trailing for the others and for flow",
    )
    sigma_max: Optional[PositiveFloat] = key(
        None,
        "start where sigma/alpha is at most this; default: 80 for cosine (near t = 990), 1000 for flow, no bound for others",
    )
    x0_clamp: Union[Literal["range", "none"], PositiveFloat] = key(
        "range",
        "bound on the clean estimate: the measured range of the latents, none, or ± a number (1.0 shrinks latents: README)",
    )
    clean_steps: Count = key(0, "make the last K steps deterministic")
    seed: Seed = key(0, "image i depends on this and i alone")
    guidance: Annotated[float, Field(ge=0.0)] = key(1.0, "scale w: uncond + w (cond - uncond); 1: off, 0: unconditional")
    guidance_interval: Optional[Annotated[list[Annotated[float, Field(ge=0.0)]], Field(min_length=2, max_length=2)]] = key(
        None, "guide only where sigma/alpha lies between these two (Kynkäänniemi et al. 2024)"
    )
    guidance_rescale: Share = key(0.0, "draw the spread of guided estimates back to the unguided ones' (Lin et al. 2024)")
    autoguidance: Optional[PathText] = key(
        None,
        "weights of an earlier snapshot or a smaller model to guide away from (Karras et al. 2024), instead of the null condition",
    )
    labels: Optional[Annotated[list[Union[bool, int, str, dict[str, Union[bool, int, str]]]], Field(min_length=1)]] = key(
        None,
        "a row of pictures for each: [0, cat] where there is one kind of label, "
        "[{hat: beanie, glasses: yes}] where there are more; default: every class, at most sampling.rows of them",
    )
    prompts: Optional[Annotated[list[str], Field(min_length=1)]] = key(None, "a row of pictures for each caption")
    slerp_to: Optional[Seed] = key(None, "another seed: each row goes from an image of `seed` to one of this seed")
    image: Optional[PathText] = key(None, "a picture to start from (image-to-image), of the model's size")
    strength: Optional[Annotated[float, Field(gt=0.0, le=1.0)]] = key(
        None,
        "share of the steps made from sampling.image; 1 forgets all of it but what a mask keeps; default: 0.6, with a mask 1",
    )
    mask: Optional[PathText] = key(None, "inpainting: a picture, white where sampling.image is to be drawn anew")
    rows: PositiveInt = key(10, "rows of the grid; where labels or prompts are given, there is one for each")
    cols: PositiveInt = key(10, "columns of the grid")
    images: Optional[PositiveInt] = key(
        None, "how many images to draw, by default rows·cols; more than fit the grid need single_files"
    )
    batch_size: PositiveInt = key(100, "images per network pass")
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "float32", "float32: the same picture in any batch size; auto: as in training, faster"
    )
    strip: Count = key(0, "frames of a denoising strip and GIF: decoded clean estimates of the first images; 0: none")
    single_files: bool = key(False, "save every image as a PNG of its own too")


class Evaluation(Section):
    task: Literal["samplers", "reconstruction", "generation", "latents", "loss"] = key(
        "generation", "what evaluate.py judges; its --help says what each does"
    )
    images: Annotated[int, Field(ge=8)] = key(256, "images to judge: noises of the samplers, generated, held-out")
    generated: Optional[Annotated[int, Field(ge=8)]] = key(
        None, "generation: so many instead; the Fréchet distance wants more of them than features (2,048 of Inception)"
    )
    reference: Annotated[int, Field(ge=8)] = key(10000, "generation: at most so many training images to compare with")
    features: Literal["inception", "mobilenet_v2", "mobilenet_v2_keras"] = key(
        "inception", "network whose features the distances are of; figures of two networks are never comparable"
    )
    weights: Optional[PathText] = key(None, "local file of that network's weights; without it the usual download")
    samplers: Annotated[list[SamplerName], Field(min_length=1)] = key(
        list(get_args(SamplerName)), "samplers: which to compare"
    )
    steps: Annotated[list[PositiveInt], Field(min_length=1)] = key([5, 10, 20, 50, 100, 1000], "samplers: numbers of steps")
    batch_size: PositiveInt = key(128, "images per network pass")
    precision: Literal["auto", "float32", "bfloat16"] = key("auto", "as in training")


class Logging(Section):
    tensorboard: bool = key(True, "write scalars and pictures for TensorBoard")
    wandb: bool = key(False, "log to Weights & Biases where the package is installed")


class Config(Section):
    name: Name = key("celeba64", "the experiment; its files lie in <runs_dir>/<name>")
    seed: Seed = key(0, "seed of training, and of the portraits of synthetic_faces")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = key("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "float32", "bfloat16"] = key("auto", "auto: bf16 where the hardware has it, else float32")
    compile: Union[Literal["auto"], bool] = key(
        "auto", "torch.compile: true; false; auto: on CUDA the networks in training, and sampling's network as a CUDA graph"
    )
    runs_dir: PathText = key("runs", "working files")
    results_dir: PathText = key("results", "grids, and the pages of evaluate.py")
    data: Data = Data()
    vae: Vae = Vae()
    encodings: Encodings = Encodings()
    text: Text = Text()
    diffusion: Diffusion = Diffusion()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def diffusion_name(self) -> str:
        return self.diffusion.name or self.diffusion.schedule

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        f = self.vae.patch * 2 ** (len(self.vae.widths) - 1)
        if self.data.image_size % f:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of the VAE's down-sampling factor {f} (vae.patch · 2^(levels-1))"
            )
        latent, halvings = self.data.image_size // f, len(self.diffusion.widths) - 1
        if latent % 2**halvings:
            raise ValueError(
                f"latents of {latent}x{latent} cannot be halved {halvings} times (diffusion.widths has {halvings + 1} levels)"
            )
        if self.diffusion_name in ("vae", "encodings.pt"):
            raise ValueError(f"diffusion.name {self.diffusion_name!r} is taken by another stage's files")
        if self.name == "cache":
            raise ValueError("name 'cache' is taken by the image cache")
        if self.sampling.steps > self.diffusion.timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} is more than diffusion.timesteps {self.diffusion.timesteps}"
            )
        if self.diffusion.condition == "text" and self.text.encoder == "none":
            raise ValueError("diffusion.condition=text needs text.encoder=clip or words")
        cross = self.diffusion.cross_attention
        if self.diffusion.condition == "text" and not {latent >> level for level in range(halvings + 1)} & set(cross):
            raise ValueError(
                f"diffusion.cross_attention {cross} names none of the widths that latents of {latent} have in the U-Net; with "
                f"diffusion.condition=text some are to attend to the caption"
            )
        s = self.sampling
        if self.diffusion.condition == "none" and s.guidance != 1 and s.autoguidance is None:
            raise ValueError(
                f"sampling.guidance={s.guidance:g} with diffusion.condition=none: the model has nothing to be guided by; set it to 1, "
                f"or name a weaker model with sampling.autoguidance"
            )
        if s.labels is not None and s.prompts is not None:
            raise ValueError("sampling.labels and sampling.prompts exclude each other")
        if s.guidance_interval is not None and not s.guidance_interval[0] < s.guidance_interval[1]:
            raise ValueError(
                f"sampling.guidance_interval goes from a lower to a higher sigma/alpha, not {s.guidance_interval}"
            )
        aside = {
            "autoguidance": s.autoguidance,
            "guidance_interval": s.guidance_interval,
            "guidance_rescale": s.guidance_rescale or None,
        }
        idle = [name for name, value in aside.items() if value is not None] if s.guidance == 1 else []
        if idle:
            raise ValueError(f"sampling.{idle[0]} has no effect with sampling.guidance=1, which is off: set it, to 2 say")
        if self.vae.adversarial.weight > 0 and self.data.image_size < 24:
            raise ValueError(
                f"vae.adversarial: its patches need pictures of 24 pixels or more, not data.image_size={self.data.image_size}"
            )
        if s.mask is not None and s.image is None:
            raise ValueError("sampling.mask needs a sampling.image")
        if s.slerp_to is not None and s.image is not None:
            raise ValueError("sampling.slerp_to and sampling.image exclude each other")
        if s.slerp_to is not None and (s.sampler in ("ancestral", "dpmpp_2m_sde") or s.eta > 0):
            raise ValueError("sampling.slerp_to needs a sampler that adds no noise of its own: ddim with eta 0, unipc, …")
        if self.sampling.clean_steps > self.sampling.steps:
            raise ValueError(
                f"sampling.clean_steps {self.sampling.clean_steps} is more than sampling.steps {self.sampling.steps}"
            )
        return self
