"""A frozen network made ready to be called thousands of times with the same shapes: weights cast once, launches made once."""

from typing import Callable

import torch
from torch import Tensor, nn

from lab.artifacts import first_line

Forward = Callable[..., Tensor]  # tensors, all with a row per image -> a tensor
# Calls on a side stream before a capture: cuBLAS allocates its workspace there; kernels were chosen in the call before.
WARM_UP = 1
TOLERANCE = 0.02  # of the output's norm: bf16 kernels that sum in another order differ by less


def cast_weights(net: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions and linear layers in the type that autocast would cast them to at every call: the same products."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


class Graphed:
    """net(*tensors) as a CUDA graph, one for each shape of its inputs: a small U-Net's kernels take less time than launching them.

    The first call with a shape is the network's own. The graph captured then must give what the network gives for other inputs
    before it is used; where that fails one line says so, and calls stay as they were. Not for gradients, nor under an autocast that
    caches its casts.
    """

    def __init__(self, net: Forward):
        self.net, self.works, self._pool = net, True, None
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        if shapes in self._graphs:
            return self._replay(*self._graphs[shapes], inputs)
        output = self.net(*inputs)
        if self.works:
            try:
                captured = self._capture(inputs)
                self._check(captured, inputs)
                self._graphs[shapes] = captured
            except RuntimeError as error:
                self.works = False
                print(f"note: sampling without a CUDA graph ({first_line(error.__context__ or error)})")
        return output

    @staticmethod
    def _replay(graph, places: list[Tensor], output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        for place, x in zip(places, inputs):
            place.copy_(x)
        graph.replay()
        return output.clone()  # the next replay writes over it

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        with torch.cuda.device(inputs[0].device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()  # one for all: outputs are copied out at once
            before, places = torch.cuda.current_stream(), [x.clone() for x in inputs]
            stream = torch.cuda.Stream()  # warm-up on a side stream, as torch.cuda.graph's own documentation has it
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.net(*places)
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: NCCL's own thread asks the device all the time
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    output = self.net(*places)
            finally:
                torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        return graph, places, output

    def _check(self, captured: tuple, inputs: tuple[Tensor, ...]) -> None:
        """Raise RuntimeError unless a replay reads its inputs and gives what the network does."""
        others = 0.5 * inputs[0], *inputs[1:]
        captured[2].fill_(torch.nan)
        expected, replayed = self.net(*others), self._replay(*captured, others)
        off = float((replayed - expected).norm() / expected.norm().clamp(min=1e-6))
        if not off <= TOLERANCE:
            raise RuntimeError(f"its output differs by {off:.1%} from the network's")
