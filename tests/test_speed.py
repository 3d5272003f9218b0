"""What saves time or memory must not change the result: checkpointed activations, slices, compiled networks, graphs."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_models import perturb, small_unet, small_vae

import models.vae
from pipeline import cuda_graphs as inference
from utils import device as training

CPU = torch.device("cpu")


def gradients_and_bytes_kept(net, *inputs) -> tuple[list, int]:
    """Gradients of the mean square of the output, and the bytes that the forward pass kept for the backward pass."""
    kept, seen = 0, set()

    def pack(x):
        nonlocal kept
        if x.data_ptr() not in seen:
            seen.add(x.data_ptr())
            kept += x.numel() * x.element_size()
        return x

    torch.manual_seed(0)
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = net(*inputs)
        loss = (output[0] if isinstance(output, tuple) else output).square().mean()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None], kept


@pytest.mark.parametrize("make, inputs", [
    (lambda: small_unet(dropout=0.3, widths=[16, 32, 32], size=16), (torch.randn(4, 4, 16, 16), torch.tensor([3, 500, 900, 20]))),
    (lambda: small_vae(widths=[16, 32], blocks=2), (torch.randn(4, 3, 32, 32), torch.randn(4, 4, 16, 16))),
])  # fmt: skip
def test_recomputed_activations_give_the_same_gradients_for_less_memory(make, inputs):
    net = perturb(make()).train()
    whole, kept = gradients_and_bytes_kept(net, *inputs)
    net.grad_checkpointing = True
    again, kept_then = gradients_and_bytes_kept(net, *inputs)
    torch.testing.assert_close(again, whole)
    assert kept_then < 0.6 * kept


def test_encoding_and_decoding_in_slices(monkeypatch):
    """The same pictures, and never more than so many pixels at once; in training the batch stays whole."""
    vae, z, sizes = perturb(small_vae()), torch.randn(7, 4, 8, 8), []
    for half in (vae.encoder, vae.decoder):
        half.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr(models.vae, "MAX_PIXELS_PER_CHUNK", 3 * 16 * 16)
    whole = vae.decode(z)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z), whole)
        torch.testing.assert_close(vae.encode(whole).mean, torch.cat([vae.encode(x[None]).mean for x in whole]))
    assert sizes == [7, 3, 3, 1] + [3, 3, 1] + [1] * 7


@pytest.fixture
def tracing(monkeypatch):
    """torch.compile without code generation, which takes a minute and a compiler: forward and backward are traced, without a
    break. Gives the list of what was compiled."""
    compiler, compiled = torch.compile, []

    def compile(f, **options):
        compiled.append(f)
        return compiler(f, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile)
    training.missing_compiler.cache_clear()
    yield compiled
    training.missing_compiler.cache_clear()
    torch.compiler.reset()


def test_compiled_networks_are_the_same_networks(tracing):
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([3, 500, 900, 20])
    net = perturb(small_unet())
    names, plain = set(net.state_dict()), net(*inputs)
    training.compile_networks(True, CPU, net)
    assert net._compiled_call_impl is not None and set(net.state_dict()) == names
    torch.testing.assert_close(net(*inputs), plain)
    copy = training.EMA(net, 0.9).net
    torch.testing.assert_close(copy(*inputs), plain)


def test_a_compiled_run_is_the_plain_run(experiment, tracing, capsys):
    """All four stages with compile on, conditions and checkpointed activations too; the weights are those of the plain run."""
    options = ["diffusion.condition=class", "diffusion.labels=[hair_color]", "vae.grad_checkpointing=true"]
    experiment.train_all(*options)
    plain = {file: (experiment.run_dir / file).read_bytes() for file in ("vae/vae.safetensors", "cosine/unet.safetensors")}
    experiment.train_all(*options, "compile=true", "name=compiled")
    assert experiment.run("infer", *options, "compile=true", "name=compiled") == 0
    owners = [
        type(f.__self__).__name__ for f in tracing if hasattr(f, "__self__")
    ]  # the VAE; its encoder; U-Net; U-Net, decoder
    assert owners == ["VAE", "Sequential", "UNet", "UNet", "Sequential"]
    from safetensors.torch import load

    for file, content in plain.items():
        there = load((experiment.run_dir.parent / "compiled" / file).read_bytes())
        torch.testing.assert_close(there, load(content), rtol=1e-3, atol=1e-4)
    assert "nothing is compiled" not in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_adaptive_weight_with_compiled_networks(experiment, tracing, checkpointing):
    """It goes back through the loss twice, which what is compiled must allow."""
    options = ["vae.adversarial.weight=0.5", "vae.adversarial.start=0", "vae.adversarial.width=8", "data.image_size=32"]
    assert experiment.run("train_vae", *options, "compile=true", f"vae.grad_checkpointing={checkpointing}", "vae.steps=2") == 0
    assert len(tracing) > 5  # the encoder's layers


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("Cannot find a working triton installation.\nmore\nlines")

    monkeypatch.setattr(torch, "compile", fails)
    training.missing_compiler.cache_clear()
    net = small_unet()
    training.compile_networks(True, CPU, net)
    training.compile_networks("auto", CPU, net)  # asks for nothing on a CPU
    training.missing_compiler.cache_clear()
    assert net._compiled_call_impl is None
    assert capsys.readouterr().out == (
        "note: nothing is compiled because torch.compile fails: Cannot find a working triton installation.\n"
    )


def test_weights_cast_once_are_those_that_autocast_casts_every_time():
    conditioning = dict(kind="words", vocabulary=["a", "b"], width=16, max_words=4)
    net = perturb(small_unet(conditioning=conditioning, cross_attention=[8], bottleneck="transformer")).eval()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([3, 500, 900, 20]), (torch.tensor([[1, 3, 4, 0, 0]] * 4),)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = net(*inputs)
        inference.cast_weights(net, torch.bfloat16)
        assert torch.equal(net(*inputs), plain)
    assert net.conv_in.weight.dtype == torch.bfloat16 and net.norm_out.weight.dtype == torch.float32


class ReplayedEagerly(inference.GraphedForward):
    """What a CUDA graph does, without one: replay reads the inputs of the capture and writes over its output."""

    def _capture(self, inputs):
        places, output = [x.clone() for x in inputs], torch.empty_like(inputs[0])
        return SimpleNamespace(replay=lambda: output.copy_(self.net(*places))), places, output


def check_graphed(graphed, net, device):
    """The network's own outputs, for inputs that change, in two shapes by turns; none is written over by the next."""
    given = [(torch.randn(n, 4, 8, 8, device=device), torch.full((n,), t, device=device)) for n, t in ((2, 5), (3, 7), (2, 900), (3, 1), (2, 5))]  # fmt: skip
    with torch.no_grad():
        outputs = [graphed(*inputs) for inputs in given]
        torch.testing.assert_close(outputs, [net(*inputs) for inputs in given], rtol=1e-3, atol=1e-4)
    assert graphed.works and len(graphed._graphs) == 2


def test_a_graph_is_the_network_for_every_input():
    net = perturb(small_unet()).eval()
    check_graphed(ReplayedEagerly(net), net, CPU)


@pytest.mark.parametrize(
    "replayed", [lambda net, z, z_0: None, lambda net, z, z_0: net(z_0), lambda net, z, z_0: 1.05 * net(z)]
)
def test_a_graph_that_is_not_the_network_is_not_used(replayed, capsys):
    """An empty one, one that reads the capture's inputs for ever, and one that is off by 5 %."""

    class Wrong(inference.GraphedForward):
        def _capture(self, inputs):
            (z,), z_0, output = [x.clone() for x in inputs], inputs[0].clone(), torch.empty_like(inputs[0])

            def replay():
                found = replayed(self.net, z, z_0)
                output.copy_(output if found is None else found)

            return SimpleNamespace(replay=replay), [z], output

    graphed = Wrong(lambda z: 3 * z)
    assert [float(graphed(torch.tensor([x]))) for x in (1.0, 2.0, 5.0)] == [3.0, 6.0, 15.0] and not graphed.works
    assert "note: sampling without a CUDA graph (its output differs by" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_a_graph_on_cuda():
    net = perturb(small_unet()).to("cuda", memory_format=torch.channels_last).eval().requires_grad_(False)
    check_graphed(inference.GraphedForward(net), net, torch.device("cuda"))
    graphed = inference.GraphedForward(net)
    inference.cast_weights(net, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # as make_denoiser calls it
        check_graphed(graphed, net, torch.device("cuda"))
    for parameter in net.parameters():
        parameter.zero_()
    z, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.full((2,), 5, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        assert torch.equal(graphed(z, t), net(z, t))  # it reads the weights where they lie


def test_without_a_graph_one_line_says_so(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no graphs on this device\nmore\nlines")

    monkeypatch.setattr(inference.GraphedForward, "_capture", fails)
    graphed = inference.GraphedForward(lambda x: 2 * x)
    assert [float(graphed(torch.tensor(x))) for x in (1.0, 2.0)] == [2.0, 4.0]
    assert capsys.readouterr().out == "note: sampling without a CUDA graph (no graphs on this device)\n"


def test_the_first_step_is_timed_apart(trained):
    lines = [json.loads(line) for line in (trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    first = [line for line in lines if "seconds_to_first_step" in line]
    assert [line["step"] for line in first] == [1] and first[0]["seconds_to_first_step"] > 0
    assert [line["step"] for line in lines if line.get("images_per_second", 0) > 0] == [2, 4, 6]


def test_a_first_step_that_is_logged_has_no_rate(experiment):
    assert experiment.run("train_vae", "vae.log_every=1", "vae.steps=2") == 0
    lines = [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert ["images_per_second" in line for line in lines if "train/loss" in line] == [False, True]
