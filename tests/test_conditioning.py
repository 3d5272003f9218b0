"""Conditions: labels, words and CLIP through the U-Net, guidance on real networks, the transformer in the middle."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import Experiment
from safetensors.torch import load_file, save_file
from torch import nn

from dataset import conditions
from dataset.encodings import CaptionEmbeddings, LatentDataset
from evaluation.generation import generate_images
from models.conditioning import LabelEmbedder, TextEmbedder, WordEncoder, make_conditioner, split_words
from models.layers import CrossAttention
from models.transformer import AdaLNZeroBlock, TransformerBottleneck
from models.unet import UNet
from pipeline.latent_diffusion import LatentDiffusion
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


def noisy(net: nn.Module) -> nn.Module:
    """Give layers that start at zero some weight, so that what hangs on them shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def unet(**settings) -> UNet:
    torch.manual_seed(0)
    return noisy(UNet(4, 8, [16, 32], 1, [4], 16, **settings))


def batch(n=3, seed=0):
    z = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return z, torch.tensor([10, 400, 900])[:n]


# Conditioners


def test_labels_add_up_and_may_be_left_unsaid():
    labels = LabelEmbedder({"colour": ["red", "green"], "shape": ["round", "square", "long"]}, 5)
    table = labels.table.weight
    (null,) = labels.null_like((torch.zeros(2, 2, dtype=torch.int64),))
    assert null.tolist() == [[2, 3], [2, 3]]
    torch.testing.assert_close(labels(torch.tensor([[1, 2]])).emb[0], table[1] + table[3 + 2])
    torch.testing.assert_close(labels(null).emb[0], table[2] + table[3 + 3])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_dropout_rate(share):
    torch.manual_seed(0)
    labels = LabelEmbedder({"class": ["a", "b", "c"]}, 4)
    (kept,) = labels.drop((torch.ones(20_000, 1, dtype=torch.int64),), share)
    assert float((kept == 3).float().mean()) == pytest.approx(share, abs=0.01) and set(kept.unique().tolist()) <= {1, 3}
    words = WordEncoder(["a"], 4, width=8)
    (numbers,) = words.drop((words.encode(["a a"] * 5000)[0],), share)
    assert float((numbers[:, 1] == WordEncoder.PADDING).float().mean()) == pytest.approx(share, abs=0.025)


def test_of_several_labels_any_share_is_left_out():
    """A uniform share of each image's labels: the mean is a half, and all and none are as likely as any other number."""
    torch.manual_seed(0)
    labels = LabelEmbedder({str(k): ["no", "yes"] for k in range(9)}, 4)
    (kept,) = labels.drop((torch.ones(40_000, 9, dtype=torch.int64),), 0.0)
    shares = torch.bincount((kept == 2).sum(dim=1), minlength=10) / 40_000
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.01)


def test_words_by_hand():
    assert split_words("Un café, собака") == ["un", "café", "собака"] == split_words("Un cafe\u0301, собака")
    assert split_words("A man's hat, 2 dogs -- and Tri-colored!") == ["a", "man's", "hat", "2", "dogs", "and", "tri", "colored"]
    words = WordEncoder(["dog", "red"], 4, width=8, max_words=3)
    numbers, unknown = words.encode(["red dog", "", "dog cat red red red"])
    assert numbers.tolist() == [[1, 4, 3, 0], [1, 0, 0, 0], [1, 3, 2, 4]] and unknown == {"cat"}


def test_the_vocabulary_is_of_words_that_return():
    captions = [["a red dog", "a dog"], ["a cat"], ["red cat, a very red cat", "red cat"]]
    words, pairs = conditions.build_vocabulary(captions)
    assert words == ["a", "cat", "dog", "red"]  # very: once
    assert pairs == ["red cat"]  # of two captions; "a red", "red dog" and the others stand in one each


def test_words_and_pairs_go_to_time_directly():
    """What a caption adds beside the transformer's part: its words' and its known pairs' rows, each as often as it stands there."""
    words = noisy(WordEncoder(["dog", "hat", "red"], 5, width=8, pairs=["red hat", "dog red"]))
    plain = WordEncoder(["dog", "hat", "red"], 5, width=8)
    plain.load_state_dict({**words.state_dict(), "ngram_table.weight": torch.zeros(7, 5)})
    row = words.ngram_table.weight
    start, dog, hat, red, red_hat, dog_red, other = row[1], row[3], row[4], row[5], row[6], row[7], row[8]
    for caption, sum_of_rows in {
        "red hat": start + red + hat + other + red_hat,  # the pair (start, red) is no known one
        "dog red hat": start + dog + red + hat + other + dog_red + red_hat,
        "hat red": start + hat + red + other + other,
        "": start,
    }.items():
        padded = words.encode([caption])[0]
        with torch.no_grad():
            for n in (padded, padded[:, : (padded > 0).sum()]):
                torch.testing.assert_close(words(n).emb - plain(n).emb, sum_of_rows[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["words", "text"])
def test_padding_is_never_attended_to(kind):
    """The same captions padded more: the same prediction. And the padding's content does not matter."""
    settings = {"kind": "words", "vocabulary": list("abcdefgh"), "pairs": ["a b", "d e"], "width": 16, "max_words": 12} if kind == "words" else \
        {"kind": "text", "model": "none", "token_dim": 16, "null_length": 2}  # fmt: skip
    net = unet(conditioning=settings, cross_attention=[8, 4])
    z, t = batch(2)
    if kind == "words":
        numbers = net.conditioner.encode(["a b c", "d e f g h"])[0]
        short, long = (numbers[:, :6],), (numbers,)
    else:
        tokens, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
        short = tokens, mask
        long = torch.cat([tokens, torch.full((2, 4, 16), 1e3)], 1), torch.cat([mask, torch.zeros(2, 4).bool()], 1)
    with torch.no_grad():
        torch.testing.assert_close(net(z, t, short), net(z, t, long), rtol=1e-4, atol=1e-5)
        other = tuple(r.flip(0) for r in short)
        assert not torch.allclose(net(z, t, short), net(z, t, other), atol=1e-3)  # it does read them


def test_the_order_of_the_vocabulary_does_not_matter():
    def of(vocabulary, pairs):
        return unet(conditioning=dict(kind="words", vocabulary=vocabulary, pairs=pairs, width=16), cross_attention=[4])

    net, turned = of(["a", "cat", "dog", "red"], ["a cat", "red dog"]), of(["red", "cat", "a", "dog"], ["red dog", "a cat"])
    turned.load_state_dict(net.state_dict())
    with torch.no_grad():
        turned.conditioner.table.weight[3:] = net.conditioner.table.weight[[6, 4, 3, 5]]
        turned.conditioner.ngram_table.weight[3:] = net.conditioner.ngram_table.weight[[6, 4, 3, 5, 8, 7, 9]]
        z, t = batch(2)
        a, b = (n(z, t, (n.conditioner.encode(["red dog", "a cat"])[0],)) for n in (net, turned))
    assert torch.equal(a, b)


def test_cross_attention_starts_as_the_identity_and_by_hand():
    torch.manual_seed(0)
    block, x, tokens = CrossAttention(8, 6, 8), torch.randn(1, 8, 2, 2), torch.randn(1, 3, 6)
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(block(x, tokens, mask), x)
    noisy(block)
    with torch.no_grad():  # one head: softmax(q k / sqrt(8)) v over the first two tokens
        q = block.q(block.norm(x).flatten(2).transpose(1, 2))[0]
        k, v = block.kv(block.norm_tokens(tokens))[0, :2].chunk(2, dim=1)
        by_hand = block.out(torch.softmax(q @ k.T / 8**0.5, dim=1) @ v).T.reshape(1, 8, 2, 2)
        torch.testing.assert_close(block(x, tokens, mask), x + by_hand)


# The transformer in the middle


def test_adaln_zero_is_the_identity_at_first():
    block, x = AdaLNZeroBlock(16, 2, 8), torch.randn(2, 5, 16)
    assert torch.equal(block(x, torch.randn(2, 8)), x)
    noisy(block)
    emb = torch.randn(2, 8)
    assert not torch.allclose(block(x, emb), block(x, emb + 1.0))  # once trained it listens to time and class


def test_adaln_by_hand():
    """x + g f(LN(x) (1 + s) + b), for the attention and then for the MLP (Peebles & Xie 2023, §3.2)."""
    block, x, emb = noisy(AdaLNZeroBlock(16, 2, 8)), torch.randn(2, 5, 16), torch.randn(2, 8)
    with torch.no_grad():
        s1, b1, g1, s2, b2, g2 = block.modulation(nn.functional.silu(emb))[:, None].split(16, dim=2)
        norm = lambda y: (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        h = x + g1 * block.attention(norm(x) * (1 + s1) + b1)
        torch.testing.assert_close(block(x, emb), h + g2 * block.mlp(norm(h) * (1 + s2) + b2))


def test_positions_are_interpolated_to_other_sizes():
    net = unet(bottleneck="transformer", bottleneck_blocks=2)
    bottleneck = net.middle[0]
    assert isinstance(bottleneck, TransformerBottleneck) and bottleneck.positions.shape == (1, 32, 4, 4)
    z = torch.randn(1, 4, 16, 16)
    assert net(z, torch.tensor([5])).shape == z.shape
    with torch.no_grad():  # without positions tokens are a set: the same map turned gives the same map turned
        x, emb = torch.randn(1, 32, 4, 4), torch.randn(1, 64)
        turned = lambda: (bottleneck(x.flip(3), emb) - bottleneck(x, emb).flip(3)).abs().max()
        assert turned() > 1e-2
        bottleneck.positions.zero_()
        assert turned() < 1e-4


def test_bad_networks():
    with pytest.raises(ValueError, match="names none of the latent's widths in the U-Net, 8, 4"):
        unet(conditioning={"kind": "words", "vocabulary": ["a"]}, cross_attention=[16])
    with pytest.raises(ValueError, match="residual, transformer"):
        unet(bottleneck="none")
    with pytest.raises(KeyError):
        make_conditioner({"kind": "smell"}, 4)


# The four stages with conditions


@pytest.fixture(scope="module")
def conditional(trained, tmp_path_factory):
    """The tiny experiment with three more U-Nets: by attributes, by words, and with a transformer by attributes."""
    folder = tmp_path_factory.mktemp("conditional")
    shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
    experiment = Experiment(folder)
    assert experiment.run("train_diffusion", *CLASSES, "diffusion.snapshot_every=3") == 0
    assert experiment.run("train_diffusion", *WORDS) == 0
    assert experiment.run("train_diffusion", *CLASSES, "diffusion.name=dit", "diffusion.bottleneck=transformer") == 0
    return experiment


def model_of(experiment, *overrides):
    config = load_config(experiment.config, experiment.argv(*overrides)[1:])
    return LatentDiffusion(config, torch.device("cpu"), torch.float32), config.sampling


@pytest.mark.parametrize("kind", [CLASSES, WORDS], ids=["classes", "words"])
def test_guidance_on_a_real_network(conditional, kind):
    """w = 1 is conditional and w = 0 unconditional, one batch of two halves is two passes, and w = 3 is their line."""
    model, s = model_of(conditional, *kind)
    noisy(model.unet)
    cond = (torch.tensor([[0, 1], [3, 0]]),) if kind is CLASSES else (model.unet.conditioner.encode(["a man with red hair", "a hat"])[0],)  # fmt: skip
    z, t = torch.randn(2, *model.shape), torch.full((2,), 500)
    at = lambda w, cond=cond: model.denoiser(s.model_copy(update={"guidance": w}), cond)(z, t)
    null = model.unet.conditioner.null_like(cond)
    cond, uncond = at(1.0), at(1.0, null)
    assert not torch.allclose(cond, uncond, atol=1e-3)
    torch.testing.assert_close(at(0.0), uncond, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at(3.0), uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_autoguidance_guides_away_from_a_snapshot(conditional, capsys):
    snapshot = conditional.run_dir / "classes" / "snapshots" / "step_0000003.safetensors"
    model, s = model_of(conditional, *CLASSES, f"sampling.autoguidance={snapshot}", "sampling.guidance=2.0")
    cond, z, t = (torch.tensor([[0, 1]]),), torch.randn(1, *model.shape), torch.tensor([500])
    good, weak = (
        model_of(conditional, *CLASSES)[0].denoiser(s.model_copy(update={"guidance": 1.0}), cond)(z, t),
        model.weaker(z, t, cond),
    )
    from models.schedules import to_z0

    weak = to_z0("eps", weak, z, model.schedule.alpha(500).float(), model.schedule.sigma(500).float())
    torch.testing.assert_close(model.denoiser(s, cond)(z, t), weak + 2 * (good - weak), rtol=1e-4, atol=1e-4)
    assert conditional.run("infer", *CLASSES, f"sampling.autoguidance={snapshot}", "sampling.guidance=2") == 0


def test_a_row_for_each_request_with_its_title(conditional, capsys):
    from PIL import Image

    asked = "sampling.labels=[{hair_color: red, glasses: yes}, {glasses: 0}, {}]"
    assert conditional.run("infer", *CLASSES, asked, "sampling.guidance=2", "sampling.trajectory_frames=3", "sampling.cols=2") == 0
    path = conditional.folder / "results" / "tiny_classes_ddim_3x2_w2.png"
    picture = Image.open(path)
    assert json.loads(picture.text["asked"]) == ["hair_color red, glasses yes", "glasses no", "anything"]
    assert picture.width == 2 * 16 + 2 and picture.height > 3 * (16 + 2 + 14) - 2
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


def test_a_mirrored_latent_keeps_its_images_condition(conditional, monkeypatch):
    """Row n + i is image i mirrored: the labels asked for are those of rows modulo n."""
    import train_diffusion

    latents, asked, original, take = [], [], conditions.of_split, train_diffusion.BatchLoader.take

    def watched(conditioner, encodings, val, device):
        found = original(conditioner, encodings, val, device)
        inner = found.take
        if not val:
            found.take = lambda rows: asked.append(rows) or inner(rows)
        return found

    monkeypatch.setattr(conditions, "of_split", watched)
    monkeypatch.setattr(
        train_diffusion.BatchLoader, "take", lambda self, now, then=None: latents.append(now) or take(self, now, then)
    )
    assert conditional.run("train_diffusion", *CLASSES, "diffusion.name=mirrors") == 0
    rows = torch.cat(latents)
    assert int(rows.max()) >= 48 and torch.equal(torch.cat(asked), rows % 48)


def test_words_that_are_not_known_are_named(conditional, capsys):
    assert conditional.run("infer", *WORDS, "sampling.prompts=[a man with red hair, a zebra]", "sampling.trajectory_frames=2") == 0
    out = capsys.readouterr().out
    assert "warning: the model knows no word 'zebra'" in out and "'man'" not in out


def test_a_class_model_of_one_label_draws_every_class(experiment, image_folder, capsys):
    for i, path in enumerate(sorted(image_folder.iterdir())):
        folder = image_folder / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    options = ("data.source=folder", f"data.path={image_folder}", "diffusion.condition=class")
    experiment.train_all(*options)
    assert experiment.run("infer", *options, "sampling.cols=2", "sampling.guidance=3") == 0
    from PIL import Image

    grid = Image.open(experiment.folder / "results" / "tiny_cosine_ddim_2x2_w3.png")
    assert json.loads(grid.text["asked"]) == ["cats", "dogs"]
    assert experiment.run("infer", *options, "sampling.labels=[dogs, 2]") == 2
    assert "class has no 2; there are: 0 cats, 1 dogs" in capsys.readouterr().err


def test_resuming_with_conditions_is_bitwise_the_same(conditional, tmp_path):
    """Captions and what is dropped of labels are drawn anew on resume exactly as in one go."""
    from conftest import Experiment
    from safetensors.torch import load_file

    for kind in (CLASSES, WORDS):
        folder = tmp_path / kind[-1]  # with a "=" in it, which makes no setting of the config's path
        shutil.copytree(conditional.folder, folder)
        experiment = Experiment(folder)
        for steps in (3, 6):
            assert experiment.run("train_diffusion", *kind, "diffusion.name=again", f"diffusion.steps={steps}") == 0  # fmt: skip
        name = kind[-1].split("=")[1]
        once, twice = (load_file(experiment.run_dir / n / "unet.safetensors") for n in (name, "again"))
        assert all(torch.equal(once[k], twice[k]) for k in once)


@pytest.mark.parametrize("model, options, message", [
    (CLASSES, ["sampling.labels=[{hair_color: 6}]"], "hair_color has no 6; there are: 0 black"),
    (CLASSES, ["sampling.labels=[{smell: 1}]"], "'smell' is not a label of this model; there are: hair_color, glasses"),
    (CLASSES, ["sampling.labels=[red]"], "say which, as in {hair_color: red}"),
    (CLASSES, ["sampling.prompts=[a man]"], "trained on labels, not on captions; use sampling.labels"),
    (WORDS, ["sampling.labels=[1]"], "trained on captions, not on labels; use sampling.prompts"),
    ([], ["sampling.labels=[1]"], "this model is unconditional; train one with diffusion.condition=class"),
    ([], ["sampling.prompts=[a man]"], "this model is unconditional; train one with diffusion.condition=text"),
    ([], ["sampling.guidance=3"], "sampling.guidance must be 1 if diffusion.condition=none (got 3)"),
    ([], ["sampling.guidance=3", "sampling.autoguidance=none.safetensors"], "none.safetensors does not exist"),
    ([], ["sampling.labels=[1]", "sampling.prompts=[a]"], "are mutually exclusive"),
    ([], ["sampling.guidance_interval=[3.0,1.0]"], "must be [low, high] with low < high"),
])  # fmt: skip
def test_bad_requests(conditional, capsys, model, options, message):
    assert conditional.run("infer", *model, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


@pytest.mark.parametrize("options, message", [
    (["diffusion.condition=class", "diffusion.labels=[hat, smell]"], "'smell' is not among the labels"),
    (["diffusion.condition=text"], "needs text.encoder=clip or words"),
    (["sampling.guidance=3"], "sampling.guidance must be 1 if diffusion.condition=none (got 3)"),
    (["diffusion.condition=text", "text.encoder=words"], "diffusion.cross_attn_resolutions must contain at least one of 8, 4"),
    (["diffusion.condition=text", "text.encoder=words", "diffusion.cross_attn_resolutions=[16]"], "must contain at least one of 8, 4, the U-Net's resolutions, if diffusion.condition=text (got [16])"),
    (["diffusion.condition=text", "text.encoder=clip", "diffusion.cross_attn_resolutions=[4]"], "text.encoder was none, now clip"),
])  # fmt: skip
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


# CLIP: a tiny random one, saved as the real one is, goes through the very same code


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


def test_clip_tokens_are_those_of_the_caption_alone(tiny_clip):
    """Whatever it is batched with; against transformers on each caption without padding. What is too long is cut at 77."""
    from transformers import AutoTokenizer, CLIPTextModel

    from dataset.text_encoder import TextEncoder

    encoder = TextEncoder(str(tiny_clip), torch.device("cpu"))
    captions = ["red", "", "a long red dog of many words", "x " * 100]
    found = encoder.encode(captions)
    tokenizer, net = AutoTokenizer.from_pretrained(str(tiny_clip)), CLIPTextModel.from_pretrained(tiny_clip).eval()
    for caption, states in zip(captions[:3], found):
        with torch.no_grad():
            alone = net(**tokenizer([caption], return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)
    assert [len(states) for states in found] == [3, 2, 22, 77] and encoder.num_truncated == 1


def test_caption_embeddings_are_ragged():
    embeddings = [torch.full((n, 3), float(n)) for n in (4, 2, 5, 2)]
    stored = CaptionEmbeddings.from_encoder(SimpleNamespace(model="m", fingerprint="f"), embeddings)
    tokens, mask = stored.take(torch.tensor([2, 0]), "cpu")
    assert mask.sum(1).tolist() == [5, 4] and tokens.shape == (2, 5, 3) and torch.equal(tokens[1, 4], torch.zeros(3))
    assert torch.equal(tokens[0], embeddings[2]) and torch.equal(tokens[1, :4], embeddings[0])
    assert torch.equal(stored.null(), embeddings[3])


def test_text_by_clip_through_all_stages(trained, tiny_clip, tmp_path, capsys):
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    clip = ["diffusion.condition=text", "text.encoder=clip", f"text.model={tiny_clip}", "diffusion.cross_attn_resolutions=[8,4]", "diffusion.name=clip"]  # fmt: skip
    assert experiment.run("create_encodings", *clip) == 0 and "captions: 56 through" in capsys.readouterr().out
    from dataset.encodings import LatentDataset

    encodings = LatentDataset.load(experiment.run_dir / "encodings.pt")
    assert len(encodings.text.lengths) == 56 + 1 and len(encodings.text.null()) == 2
    assert experiment.run("create_encodings", *clip) == 0 and "up to date" in capsys.readouterr().out
    assert experiment.run("train_diffusion", *clip) == 0
    model, _ = model_of(experiment, *clip)
    assert torch.equal(model.unet.conditioner.null_tokens, encodings.text.null())
    assert (
        experiment.run("infer", *clip, "sampling.prompts=[red, a red dog]", "sampling.guidance=4", "sampling.trajectory_frames=2") == 0
    )
    assert (tmp_path / "results" / "tiny_clip_ddim_2x3_w4_strip.png").exists()

    moved = shutil.copytree(tiny_clip, tmp_path / "moved")  # it is known by its weights, not by where it lies
    assert experiment.run("infer", *clip, f"text.model={moved}", "sampling.prompts=[red]") == 0
    capsys.readouterr()
    assert experiment.run("create_encodings", *clip, f"text.model={moved}") == 0 and "up to date" in capsys.readouterr().out
    assert (
        experiment.run("train_diffusion", *clip, f"text.model={moved}") == 0 and "already trained" in capsys.readouterr().out
    )
    weights = load_file(moved / "model.safetensors")
    save_file(
        {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}, moved / "model.safetensors", {"format": "pt"}
    )
    capsys.readouterr()
    assert experiment.run("infer", *clip, f"text.model={moved}", "sampling.prompts=[red]") == 2
    assert "has other weights than" in capsys.readouterr().err
    assert (
        experiment.run("create_encodings", *clip, f"text.model={moved}") == 0 and "up to date" not in capsys.readouterr().out
    )
    assert experiment.run("evaluate", *clip, f"text.model={moved}", "evaluation.task=loss", "evaluation.num_images=8") == 2
    assert "were embedded by" in capsys.readouterr().err


def test_captions_are_embedded_in_parts(trained, tiny_clip, tmp_path, monkeypatch, capsys):
    """Interrupted after two of its three parts, and with another batch: the embeddings are those made at once, in their order."""
    import create_encodings
    from dataset.encodings import LatentDataset

    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment, save, written = Experiment(tmp_path), create_encodings.save_tensors, []
    clip = ["text.encoder=clip", f"text.model={tiny_clip}", "diffusion.cross_attn_resolutions=[8,4]"]
    assert experiment.run("create_encodings", *clip) == 0
    path = experiment.run_dir / "encodings.pt"
    whole = LatentDataset.load(path).text
    path.unlink()

    def interrupted(file, content):
        if len([name for name in written if "captions" in name]) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        save(file, content)

    monkeypatch.setattr(create_encodings, "PART", 20)
    monkeypatch.setattr(create_encodings, "save_tensors", interrupted)
    assert experiment.run("create_encodings", *clip) == 130 and not path.exists()
    monkeypatch.setattr(
        create_encodings, "save_tensors", lambda file, content: (written.append(file.name), save(file, content))
    )
    assert experiment.run("create_encodings", *clip, "encodings.batch_size=7") == 0
    assert len(written) == len(set(written)) and len([name for name in written if "captions" in name]) == 3
    text = LatentDataset.load(path).text
    assert text.lengths.tolist() == whole.lengths.tolist()
    torch.testing.assert_close(text.values, whole.values, rtol=2e-3, atol=2e-3)
    assert not list(experiment.run_dir.glob("encodings.parts*"))


def test_a_text_encoder_that_cannot_be_loaded(trained, tmp_path, capsys):
    assert trained.run("create_encodings", "text.encoder=clip", f"text.model={tmp_path}") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "cannot be loaded" in error[0] and "text.model=FOLDER" in error[0], error


def test_text_reads_the_last_token_that_is_no_padding():
    text = TextEmbedder("m", 3, 2, 4)
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    torch.testing.assert_close(text(tokens, mask).emb, text.to_emb(torch.stack([tokens[0, 1], tokens[1, 3]])))


def test_other_labels_than_the_model_was_trained_with_are_refused(conditional):
    model, _ = model_of(conditional, *CLASSES)
    encodings = LatentDataset.load(conditional.run_dir / "encodings.pt")
    conditions.of_split(model.unet.conditioner, encodings, True, torch.device("cpu"))
    names = encodings.label_names
    for changed in ({**names, "glasses": ["yes", "no"]}, {k: v for k, v in names.items() if k != "glasses"}, {}):
        encodings.label_names = changed
        with pytest.raises(UserError, match="glasses: (yes|no such label)|hair_color: no such label"):
            conditions.of_split(model.unet.conditioner, encodings, True, torch.device("cpu"))
    model, _ = model_of(conditional, *WORDS)
    encodings.captions = encodings.val_captions = None
    with pytest.raises(UserError, match="holds no captions"):
        conditions.of_split(model.unet.conditioner, encodings, True, torch.device("cpu"))


def test_guidance_needs_a_null_condition_that_is_trained(trained, tmp_path, capsys):
    """One kind of label is never left unsaid without cfg_dropout; of several any is, and so all at times."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    experiment = Experiment(tmp_path)
    for labels, code in (("[hat]", 2), ("[hat, glasses]", 0)):
        options = (
            "diffusion.condition=class",
            f"diffusion.labels={labels}",
            f"diffusion.name=n{code}",
            "diffusion.cfg_dropout=0",
        )
        assert experiment.run("train_diffusion", *options) == 0
        assert experiment.run("infer", *options) == 0 and experiment.run("infer", *options, "sampling.guidance=2") == code
    assert "was trained with diffusion.cfg_dropout=0" in capsys.readouterr().err


def test_an_error_names_what_the_user_can_do():
    with pytest.raises(UserError, match="needs text.encoder"):
        load_config(None, ["diffusion.condition=text"])


def test_a_class_called_by_a_number_is_taken_by_its_name():
    assert [conditions._index("class", value, ["1", "10", "2"]) for value in (1, 10, "2", 0)] == [0, 1, 2, 0]
    every = conditions.requested(load_config(None), LabelEmbedder({"class": ["1", "10", "2"]}, 8), torch.device("cpu"))
    assert every.raw[0].tolist() == [[0], [1], [2]]
