"""Forward and backward of stagecut's stages against the same blocks cut by hand, on one device, without a
schedule.

python benchmarks/stage_overhead.py                        # on a GPU
python benchmarks/stage_overhead.py --device cpu --small   # a tiny model, to try the script

The model is that of gpu_pipeline.py in two stages. With long sequences the GPU is the slower part, with short
ones the process that starts its kernels, which is where a stage could cost more. The ways alternate; a ratio
is the median of those of neighbours.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from gpu_pipeline import SMALL, Llama, Size, compile_in_place, loss_of
from torch import nn

from stagecut import SplitPoint, pipeline

REPEATS = 15
"""How often each way is timed."""


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """The time of a step, its kernels included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stepper(
    stages: list[nn.Module], tokens: torch.Tensor, target: torch.Tensor
) -> Callable[[], None]:
    """Forward and backward through the stages, four micro-batches."""

    def step() -> None:
        for _ in range(4):
            x = tokens
            for stage in stages:
                x = stage(x)
            loss_of(x, target).backward()

    return step


def ratio(size: Size, device: torch.device, compiled: str) -> tuple[float, float]:
    """Speed of stagecut's stages over that of stages by hand, and the seconds of a step by hand."""
    torch.manual_seed(0)
    with device:
        model = Llama(size).to(
            torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        tokens, target = (
            torch.randint(size.vocabulary, (size.batch, size.length)) for _ in range(2)
        )
    half = size.blocks // 2
    pipe = pipeline(
        model,
        (tokens,),
        split_spec={f"blocks.{half}": SplitPoint.BEGINNING},
        check=None,
    )
    by_hand = [model.part(0, half), model.part(half, size.blocks)]
    for stage in [*pipe.stages, *by_hand]:
        compile_in_place(stage, compiled)
    ours = stepper(list(pipe.stages), tokens, target)
    hand = stepper(by_hand, tokens, target)
    for step in (ours, hand, ours, hand):
        step()
    pairs = []
    for repeat in range(REPEATS):
        first, second = (ours, hand) if repeat % 2 else (hand, ours)
        times = seconds(first, device), seconds(second, device)
        pairs.append(times if repeat % 2 else times[::-1])
    return median(h / o for o, h in pairs), median(h for _, h in pairs)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    args = parser.parse_args()
    size, device = SMALL if args.small else Size(), torch.device(args.device)
    print(
        f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, torch {torch.__version__}"
    )
    print(
        f"{'sequence':>10} {'compiled':10}{'by hand, ms':>14}{'speed, stagecut / by hand':>28}",
        flush=True,
    )
    for length, compiled in [
        (n, c)
        for n in (size.length, size.length // 16)
        for c in ("", "blocks", "stages")
    ]:
        torch.compiler.reset()
        found, took = ratio(replace(size, length=length), device, compiled)
        print(
            f"{length:>10} {compiled or '-':10}{1000 * took:>14.1f}{found:>28.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
