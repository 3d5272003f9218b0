"""Faster repeated calls of a frozen network: cast the weights once, and replay kernel launches as a CUDA graph."""

from typing import Callable

import torch
from torch import Tensor, nn

from utils.files import first_line

Forward = Callable[..., Tensor]  # input tensors, with one row per image -> output tensor
TOLERANCE = 0.02  # largest relative error of a graph's output; bf16 kernels that sum in another order differ by less


def cast_weights(net: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions and linear layers once, in place. Autocast would cast them in every call."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


class GraphedForward:
    """Run net(*tensors) as a CUDA graph, one graph per input shape. For inference only.

    Launching the kernels of a small U-Net one by one takes longer than running them. The first call with a new shape runs
    eagerly and captures a graph. The graph is used if it reproduces the eager output for other inputs. If not, a note is
    printed and no more graphs are captured. Autocast around a call must have cache_enabled=False.
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
            # All graphs can share one memory pool, because each output is copied before another graph runs.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            main_stream, static_inputs = torch.cuda.current_stream(), [x.clone() for x in inputs]
            side_stream = torch.cuda.Stream()  # PyTorch requires a warm-up on a side stream before capture
            side_stream.wait_stream(main_stream)
            with torch.cuda.stream(side_stream):
                self.net(*static_inputs)  # cuBLAS allocates its workspace in this call
            main_stream.wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: otherwise, calls of other threads (NCCL's watchdog) would abort the capture
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    output = self.net(*static_inputs)
            finally:
                torch.cuda.set_stream(main_stream)  # needed after a failed capture, which leaves its own stream current
        return graph, static_inputs, output

    def _check(self, captured: tuple, inputs: tuple[Tensor, ...]) -> None:
        """Raise RuntimeError unless a replay reproduces the eager output for inputs that differ from the captured ones."""
        other_inputs = 0.5 * inputs[0], *inputs[1:]
        captured[2].fill_(torch.nan)
        expected, replayed = self.net(*other_inputs), self._replay(*captured, other_inputs)
        difference = float((replayed - expected).norm() / expected.norm().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise RuntimeError(f"the graph's output differs from the eager output by {difference:.1%}")
