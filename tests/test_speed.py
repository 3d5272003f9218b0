"""Optimizations must not change the result: gradient checkpointing, chunks, torch.compile, CUDA graphs."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load
from test_models import perturb, small_unet, small_vae

import models.vae
from pipeline.cuda_graphs import GraphedForward, cast_weights
from training.optim import EMA
from utils import device as device_utils

CPU = torch.device("cpu")


def gradients_and_saved_bytes(net, *inputs) -> tuple[list, int]:
    """Gradients of the mean squared output, and the bytes saved for the backward pass."""
    saved_bytes, pointers = 0, set()

    def pack(x):
        nonlocal saved_bytes
        if x.data_ptr() not in pointers:
            pointers.add(x.data_ptr())
            saved_bytes += x.numel() * x.element_size()
        return x

    torch.manual_seed(0)
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = net(*inputs)
        loss = (output[0] if isinstance(output, tuple) else output).square().mean()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None], saved_bytes


@pytest.mark.parametrize("make, inputs", [
    (lambda: small_unet(dropout=0.3, channels=[16, 32, 32], size=16), (torch.randn(4, 4, 16, 16), torch.tensor([3, 500, 900, 20]))),
    (lambda: small_vae(channels=[16, 32], num_res_blocks=2), (torch.randn(4, 3, 32, 32), torch.randn(4, 4, 16, 16))),
])  # fmt: skip
def test_grad_checkpointing_gives_the_same_gradients_with_less_memory(make, inputs):
    net = perturb(make()).train()
    gradients, saved = gradients_and_saved_bytes(net, *inputs)
    net.grad_checkpointing = True
    checkpointed_gradients, checkpointed_saved = gradients_and_saved_bytes(net, *inputs)
    torch.testing.assert_close(checkpointed_gradients, gradients)
    assert checkpointed_saved < 0.6 * saved


def test_encoding_and_decoding_in_chunks(monkeypatch):
    """Same images, at most MAX_PIXELS_PER_CHUNK pixels per chunk; with gradients the batch is not split."""
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
    """Make torch.compile trace forward and backward without graph breaks, but generate no code. Return the list of compiled
    functions."""
    compiler, compiled = torch.compile, []

    def compile(f, **options):
        compiled.append(f)
        return compiler(f, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile)
    device_utils.missing_compiler.cache_clear()
    yield compiled
    device_utils.missing_compiler.cache_clear()
    torch.compiler.reset()


def test_compiled_networks_give_the_same_outputs(tracing):
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([3, 500, 900, 20])
    net = perturb(small_unet())
    names, plain = set(net.state_dict()), net(*inputs)
    device_utils.compile_networks(True, CPU, net)
    assert net._compiled_call_impl is not None and set(net.state_dict()) == names
    torch.testing.assert_close(net(*inputs), plain)
    copy = EMA(net, 0.9).net
    torch.testing.assert_close(copy(*inputs), plain)


def test_compiled_training_gives_the_same_weights(experiment, tracing, capsys):
    """All four stages with compile=true, labels and grad_checkpointing give the weights of an eager run."""
    options = ["diffusion.condition=class", "diffusion.labels=[hair_color]", "vae.grad_checkpointing=true"]
    experiment.train_all(*options)
    plain = {file: (experiment.run_dir / file).read_bytes() for file in ("vae/vae.safetensors", "cosine/unet.safetensors")}
    experiment.train_all(*options, "compile=true", "name=compiled")
    assert experiment.run("infer", *options, "compile=true", "name=compiled") == 0
    modules = [type(f.__self__).__name__ for f in tracing if hasattr(f, "__self__")]
    assert modules == ["VAE", "Sequential", "UNet", "UNet", "Sequential"]  # VAE; its encoder; U-Net; U-Net and decoder
    for file, content in plain.items():
        compiled = load((experiment.run_dir.parent / "compiled" / file).read_bytes())
        torch.testing.assert_close(compiled, load(content), rtol=1e-3, atol=1e-4)
    assert "are not compiled" not in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_adaptive_weight_with_compiled_networks(experiment, tracing, checkpointing):
    """It runs two backward passes through the same graph, which compiled modules must allow."""
    options = ["vae.adversarial.weight=0.5", "vae.adversarial.start=0", "vae.adversarial.width=8", "data.image_size=32"]
    options += ["compile=true", f"vae.grad_checkpointing={checkpointing}", "vae.steps=2"]
    assert experiment.run("train_vae", *options) == 0
    assert len(tracing) > 5  # the encoder's layers


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("Cannot find a working triton installation.\nmore\nlines")

    monkeypatch.setattr(torch, "compile", fails)
    device_utils.missing_compiler.cache_clear()
    net = small_unet()
    device_utils.compile_networks(True, CPU, net)
    device_utils.compile_networks("auto", CPU, net)  # does nothing on a CPU
    device_utils.missing_compiler.cache_clear()
    assert net._compiled_call_impl is None
    assert capsys.readouterr().out == (
        "note: networks are not compiled because torch.compile fails: Cannot find a working triton installation.\n"
    )


def test_cast_weights_gives_the_outputs_of_autocast():
    conditioning = dict(kind="words", vocabulary=["a", "b"], width=16, max_words=4)
    net = perturb(small_unet(conditioning=conditioning, cross_attn_resolutions=[8], bottleneck="transformer")).eval()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([3, 500, 900, 20]), (torch.tensor([[1, 3, 4, 0, 0]] * 4),)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = net(*inputs)
        cast_weights(net, torch.bfloat16)
        assert torch.equal(net(*inputs), plain)
    assert net.conv_in.weight.dtype == torch.bfloat16 and net.norm_out.weight.dtype == torch.float32


class EagerReplay(GraphedForward):
    """Imitates a CUDA graph on the CPU: replay reads the static inputs and overwrites the static output."""

    def _capture(self, inputs):
        static_inputs, output = [x.clone() for x in inputs], torch.empty_like(inputs[0])
        return SimpleNamespace(replay=lambda: output.copy_(self.net(*static_inputs))), static_inputs, output


def check_graphed(graphed, net, device):
    """Outputs equal the network's for changing inputs of two alternating shapes, and later calls do not overwrite them."""
    calls = [(torch.randn(n, 4, 8, 8, device=device), torch.full((n,), t, device=device)) for n, t in ((2, 5), (3, 7), (2, 900), (3, 1), (2, 5))]  # fmt: skip
    with torch.no_grad():
        outputs = [graphed(*inputs) for inputs in calls]
        torch.testing.assert_close(outputs, [net(*inputs) for inputs in calls], rtol=1e-3, atol=1e-4)
    assert graphed.enabled and len(graphed._graphs) == 2


def test_graph_reproduces_the_network():
    net = perturb(small_unet()).eval()
    check_graphed(EagerReplay(net), net, CPU)


@pytest.mark.parametrize(
    "replayed", [lambda net, z, z_0: None, lambda net, z, z_0: net(z_0), lambda net, z, z_0: 1.05 * net(z)]
)
def test_wrong_graphs_are_not_used(replayed, capsys):
    """An empty graph, one that ignores new inputs, and one whose output is off by 5 %."""

    class Wrong(GraphedForward):
        def _capture(self, inputs):
            (z,), z_0, output = [x.clone() for x in inputs], inputs[0].clone(), torch.empty_like(inputs[0])

            def replay():
                result = replayed(self.net, z, z_0)
                output.copy_(output if result is None else result)

            return SimpleNamespace(replay=replay), [z], output

    graphed = Wrong(lambda z: 3 * z)
    assert [float(graphed(torch.tensor([x]))) for x in (1.0, 2.0, 5.0)] == [3.0, 6.0, 15.0] and not graphed.enabled
    assert "note: sampling runs without CUDA graphs (the graph's output differs" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_on_cuda():
    net = perturb(small_unet()).to("cuda", memory_format=torch.channels_last).eval().requires_grad_(False)
    check_graphed(GraphedForward(net), net, torch.device("cuda"))
    graphed = GraphedForward(net)
    cast_weights(net, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # as make_denoiser calls it
        check_graphed(graphed, net, torch.device("cuda"))
    for parameter in net.parameters():
        parameter.zero_()
    z, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.full((2,), 5, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        assert torch.equal(graphed(z, t), net(z, t))  # the graph reads the current weights


def test_a_failed_capture_is_reported_in_one_line(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no graphs on this device\nmore\nlines")

    monkeypatch.setattr(GraphedForward, "_capture", fails)
    graphed = GraphedForward(lambda x: 2 * x)
    assert [float(graphed(torch.tensor(x))) for x in (1.0, 2.0)] == [2.0, 4.0]
    assert capsys.readouterr().out == "note: sampling runs without CUDA graphs (no graphs on this device)\n"


def test_the_first_step_is_not_part_of_the_rate(trained):
    lines = [json.loads(line) for line in (trained.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    first = [line for line in lines if "seconds_to_first_step" in line]
    assert [line["step"] for line in first] == [1] and first[0]["seconds_to_first_step"] > 0
    assert [line["step"] for line in lines if line.get("images_per_second", 0) > 0] == [2, 4, 6]


def test_a_log_line_after_the_first_step_has_no_rate(experiment):
    assert experiment.run("train_vae", "vae.log_every=1", "vae.steps=2") == 0
    lines = [json.loads(line) for line in (experiment.run_dir / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert ["images_per_second" in line for line in lines if "train/loss" in line] == [False, True]
