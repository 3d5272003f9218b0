"""A frozen network made ready to be called thousands of times with the same shapes: weights cast once, launches made once."""

from typing import Callable

import torch
from torch import Tensor, nn

from lab.artifacts import first_line

Forward = Callable[..., Tensor]  # tensors, all with a row per image -> a tensor
WARM_UP = 3  # calls before a capture, in which cuDNN and cuBLAS choose kernels and allocate their workspaces
TOLERANCE = 0.02  # of the output's norm: bf16 kernels that sum in another order differ by less


def cast_weights(net: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions and linear layers in the type that autocast would cast them to at every call: the same products."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


class Graphed:
    """net(*tensors) as a CUDA graph, one for each shape of its inputs: a small U-Net's kernels take less time than launching them.

    The first call with a shape is the network's own; the graph captured then must give the same before it is used. Where that fails
    one line says so, and calls stay as they were. Not for gradients, nor under an autocast that caches its casts.
    """

    def __init__(self, net: Forward):
        self.net, self.works = net, True
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        if shapes in self._graphs:
            graph, places, output = self._graphs[shapes]
            for place, x in zip(places, inputs):
                place.copy_(x)
            graph.replay()
            return output.clone()  # the next replay writes over it
        output = self.net(*inputs)
        if self.works:
            try:
                self._graphs[shapes] = self._capture(inputs, output)
            except RuntimeError as error:
                self.works = False
                print(f"note: sampling without a CUDA graph ({first_line(error)})")
        return output

    def _capture(self, inputs: tuple[Tensor, ...], expected: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()  # warm-up on a side stream, as torch.cuda.graph's own documentation has it
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.net(*places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread asks the device all the time
            output = self.net(*places)
        graph.replay()
        off = float((output - expected).norm() / expected.norm())
        if not off <= TOLERANCE:
            raise RuntimeError(f"its output differs by {off:.1%} from the network's")
        return graph, places, output
