"""Time of a backward in two steps, inputs first and weights later, over that of autograd's whole backward.

python benchmarks/split_backward.py                  # on a GPU
python benchmarks/split_backward.py --device cpu     # small tensors: the time that the process takes

A stage of so many blocks of the model of gpu_pipeline.py, which receives and hands on a hidden state. `torch`
is torch's split for zero-bubble schedules, `graph` what Driver(backward="graph") runs, `compiled` the same
with compile=True. The ways alternate; a ratio is the median of those to the whole backward beside it.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from gpu_pipeline import Llama, Size
from torch import nn
from torch.distributed.pipelining._backward import (
    stage_backward_input,
    stage_backward_weight,
)

from stagecut import Pipe, SplitPoint, pipeline
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.roles import RoleCode

HOST = Size(width=64, heads=4, hidden=128, vocabulary=64, length=16, batch=1)
"""A size at which a device waits for the process that starts its kernels."""

Backward = Callable[[], None]
Way = Callable[[], Backward]
"""Runs the forward, and gives the backward, which is timed."""


class Middle:
    """The middle stage of a model: all its blocks but the first and the last."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            model = Llama(size).to(
                torch.bfloat16 if device.type == "cuda" else torch.float32
            )
            tokens = torch.randint(size.vocabulary, (size.batch, size.length))
        cuts = (1, size.blocks - 1)
        self.pipe: Pipe = pipeline(
            model,
            (tokens,),
            split_spec={f"blocks.{cut}": SplitPoint.BEGINNING for cut in cuts},
            check=None,
        )
        self.stage: nn.Module = self.pipe.stages[1]
        arriving = self.pipe.stages[0](tokens)
        several = arriving if isinstance(arriving, tuple) else (arriving,)
        self._arriving = [tensor.detach() for tensor in several]
        self._grads: list[torch.Tensor] = []

    def inputs(self) -> list[torch.Tensor]:
        """What the stage receives, as leaves."""
        return [
            tensor.clone().requires_grad_(tensor.is_floating_point())
            for tensor in self._arriving
        ]

    def grads(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of the outputs, always the same."""
        if not self._grads:
            self._grads = [torch.randn_like(output) for output in outputs]
        return self._grads

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs by autograd."""
        result = self.stage(*inputs)
        return list(result) if isinstance(result, tuple) else [result]

    def whole(self) -> Backward:
        """Autograd's backward."""
        outputs = self.outputs(self.inputs())
        grads = self.grads(outputs)
        return lambda: torch.autograd.backward(outputs, grads)

    def torchs(self) -> Backward:
        """torch's split."""
        inputs = self.inputs()
        outputs = self.outputs(inputs)
        grads = self.grads(outputs)

        def backward() -> None:
            _, groups = stage_backward_input(
                outputs, grads, inputs, self.stage.parameters()
            )
            stage_backward_weight(self.stage.parameters(), groups)

        return backward

    def by_graphs(self, compiled: bool) -> Way:
        """Our split."""
        graphs = Graphs(self.pipe, 1, RoleCode(compiled))

        def forward() -> Backward:
            graphs.begin(self.stage)
            outputs = graphs.run(self.inputs())
            assert outputs is not None, graphs.note
            grads = self.grads(list(outputs))

            def backward() -> None:
                torch.autograd.backward(outputs, grads)
                graphs.take_weights()()

            return backward

        return forward


def seconds(way: Way, device: torch.device) -> float:
    """The time of one backward, its kernels included."""
    backward = way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(
    size: Size, device: torch.device, compiled: bool, repeats: int
) -> tuple[float, dict[str, float]]:
    """The milliseconds of the whole backward, and the ratio of each way to it."""
    middle = Middle(size, device)
    ways: dict[str, Way] = {"torch": middle.torchs, "graph": middle.by_graphs(False)}
    if compiled:
        ways["compiled"] = middle.by_graphs(True)
    for way in (middle.whole, *ways.values()):
        for _ in range(3):
            seconds(way, device)
    parts: dict[str, list[float]] = {name: [] for name in ways}
    wholes = []
    for _ in range(repeats):
        for name, way in ways.items():
            whole = seconds(middle.whole, device)
            parts[name].append(seconds(way, device) / whole)
            wholes.append(whole)
    return 1e3 * median(wholes), {name: median(part) for name, part in parts.items()}


def main() -> None:
    """A line for each depth."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 32])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {device}")
    print("blocks  whole backward      input + weights, relative to it")
    for blocks in arguments.blocks:
        size = HOST if device.type == "cpu" else Size()
        size = replace(size, blocks=blocks + 2)
        whole, parts = ratios(size, device, arguments.compile, arguments.repeats)
        columns = "   ".join(f"{name} {ratio:.2f}" for name, ratio in parts.items())
        print(f"{blocks:6}  {whole:11.2f} ms      {columns}")


if __name__ == "__main__":
    main()
