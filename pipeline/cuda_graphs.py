"""Faster repeated calls of a frozen network: weights cast once, and kernel launches replayed as a CUDA graph."""

from typing import Callable

import torch
from torch import Tensor, nn

from utils.files import first_line

Forward = Callable[..., Tensor]  # tensors with one row per image -> tensor
TOLERANCE = 0.02  # relative to the output norm; bf16 kernels with another summation order differ by less


def cast_weights(net: nn.Module, dtype: torch.dtype) -> None:
    """Cast convolutions and linear layers in place, which autocast would repeat in every call."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


class GraphedForward:
    """net(*tensors) as CUDA graphs, one per input shape. Launching the kernels of a small U-Net takes longer than running them.

    The first call with a new shape runs eagerly and captures a graph. The graph is used only if it reproduces the eager output
    for other inputs; otherwise one line is printed and all calls stay eager. Inference only; autocast must not cache casts.
    """

    def __init__(self, net: Forward):
        self.net, self.enabled, self._pool = net, True, None
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        if shapes in self._graphs:
            return self._replay(*self._graphs[shapes], inputs)
        output = self.net(*inputs)
        if self.enabled:
            try:
                captured = self._capture(inputs)
                self._check(captured, inputs)
                self._graphs[shapes] = captured
            except RuntimeError as error:
                self.enabled = False
                print(f"note: sampling runs without CUDA graphs ({first_line(error.__context__ or error)})")
        return output

    @staticmethod
    def _replay(graph, static_inputs: list[Tensor], output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        graph.replay()
        return output.clone()  # the next replay overwrites it

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        with torch.cuda.device(inputs[0].device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()  # shared: outputs are copied out at once
            main_stream, static_inputs = torch.cuda.current_stream(), [x.clone() for x in inputs]
            side_stream = torch.cuda.Stream()  # warm up on a side stream, as the documentation of torch.cuda.graph asks for
            side_stream.wait_stream(main_stream)
            with torch.cuda.stream(side_stream):
                self.net(*static_inputs)  # cuBLAS allocates its workspace in this call
            main_stream.wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local, because NCCL's watchdog thread queries the device all the time
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    output = self.net(*static_inputs)
            finally:
                torch.cuda.set_stream(main_stream)  # a failed capture leaves its own stream behind
        return graph, static_inputs, output

    def _check(self, captured: tuple, inputs: tuple[Tensor, ...]) -> None:
        """Raise RuntimeError unless a replay with other inputs reproduces the eager output."""
        other_inputs = 0.5 * inputs[0], *inputs[1:]
        captured[2].fill_(torch.nan)
        expected, replayed = self.net(*other_inputs), self._replay(*captured, other_inputs)
        difference = float((replayed - expected).norm() / expected.norm().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the graph's output differs from the eager output by {difference:.1%}")
