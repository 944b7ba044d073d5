"""A function of tensors as a CUDA graph: captured once, then replayed.

A step of a large model starts some thousand small kernels, and on a GPU to start them takes longer
than to run them. A graph starts all of them at once. It reads and writes fixed addresses only, and
must not wait for the GPU in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # calls before the capture, in which libraries choose kernels and allocate
LOG = logging.getLogger(__name__)


class GraphedFunction:
    """A function of tensors with fixed shapes, replayed as a graph on a GPU.

    On other devices the function is called, with the same buffers. So it is where a capture fails,
    which is logged once.

    Args:
        function: of tensors, called with the buffers. It may be called more often than asked for,
            with the inputs of the first call.
        inputs: of the first call; the buffers have their shapes, dtypes and device.
        pool: graphs with one pool share memory. The output of one then lasts until another is
            replayed.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None
    ) -> None:
        self.function = function
        with torch.inference_mode(False):  # so that they can be written outside of it, too
            self.buffers = [torch.empty_like(tensor) for tensor in inputs]
        with torch.no_grad():
            for buffer, tensor in zip(self.buffers, inputs, strict=True):
                buffer.copy_(tensor)
        self.graph: Any = None
        self.output: Any = None
        if self.buffers[0].is_cuda:
            self._capture(pool)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's output for other inputs.

        Args:
            inputs: on any device, with at most as many rows as the buffers; the other rows keep
                what was there.

        Returns:
            As many rows as the buffers have; on a GPU valid until the next call.
        """
        for buffer, tensor in zip(self.buffers, inputs, strict=True):
            buffer[: len(tensor)].copy_(tensor)
        if self.graph is None:
            return self.function(*self.buffers)
        self.graph.replay()
        return self.output  # type: ignore[no-any-return]

    def _capture(self, pool: Any) -> None:
        device = self.buffers[0].device
        with torch.cuda.device(device):
            here = torch.cuda.current_stream()
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self.function(*self.buffers)
            here.wait_stream(aside)
            # All captures share a stream, and with it the workspace of cuBLAS. Without it, each
            # graph has a workspace in memory of its own, and none is left in that of another.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.stream(here):  # also after a capture that has failed
                    self._record(pool)
            finally:
                torch._C._cuda_clearCublasWorkspaces()

    def _record(self, pool: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.output = self.function(*self.buffers)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            reason = str(error).partition("\n")[0]
            LOG.warning("no CUDA graph (%s); steps are slower without", reason)
            self.output = None
        else:
            self.graph = graph


def new_pool() -> Any:
    """Memory that several graphs share; None without a GPU."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
