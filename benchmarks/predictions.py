"""The predicted step of a pipeline beside the measured one: for cuts by hand and for the automatic one, under
several schedules, eager and compiled.

torchrun --nproc-per-node 2 benchmarks/predictions.py --device cuda
torchrun --nproc-per-node 2 benchmarks/predictions.py --device cpu --small    # tiny models, to try the script

Blocks are timed on the first process, and a step is simulated from their seconds. `error` is predicted /
measured - 1, `ranks` is Spearman's correlation of the predicted and the measured order of the cuts by hand.
`compiled` means that each block is compiled, as is usual for large models; `graph`, `graph-compiled` and
`graph-recompute` what Driver(backward="graph") runs, alone, with compile=True, with recompute=True as well.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from gpu_pipeline import SMALL, Llama, Size, loss_of
from torch import nn

from stagecut import Balanced, Driver, Pipe, Setting, record
from stagecut.backend.costs.line import Line
from stagecut.backend.costs.loss import counted_loss
from stagecut.backend.costs.measured import Trial, time_spans
from stagecut.backend.costs.ops import DEVICES
from stagecut.backend.costs.way import Way
from stagecut.ir.run.call import check_inputs
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes
from stagecut.pipe import cut_copy, lower

SCHEDULES = {"1F1B": 1, "Interleaved1F1B": 2, "ZBVZeroBubble": 2}
"""Schedule -> stages a rank."""


@dataclass
class Case:
    """A model, an example of its arguments for one micro-batch, its loss, and how many micro-batches."""

    name: str
    model: nn.Module
    args: tuple[torch.Tensor, ...]
    target: torch.Tensor
    loss_fn: Callable[..., torch.Tensor]
    microbatches: int


class Wide(nn.Module):
    """Convolutions whose images get smaller and whose channels get more, as in a ResNet."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, base, 3, padding=1)])
        for level in range(4):
            width = base * 2**level
            for _ in range(3):
                self.blocks.append(_unit(width, width, 1))
            self.blocks.append(_unit(width, 2 * width, 2))
        self.head = nn.Linear(16 * base, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def _unit(width: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, out, 3, stride=stride, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def llama_like(device: torch.device, small: bool, size: Size | None = None) -> Case:
    size = size or Size()
    if small:
        size = replace(SMALL, blocks=size.blocks // 2)
    model = Llama(size)
    tokens = torch.randint(size.vocabulary, (size.batch, size.length), device=device)
    return Case("Llama-like", model, (tokens,), tokens, loss_of, size.microbatches[0])


LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip


def hugging_face(
    device: torch.device,
    small: bool,
    shape: dict[str, int] = LLAMA_1B,
    tokens: tuple[int, int] = (1, 4096),
    name: str = "Llama 3.2-1B",
) -> Case:
    """A Llama of the shape given, whose head is not tied. tokens: rows and length of a micro-batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if small:
        shape = shape | {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "num_hidden_layers": shape["num_hidden_layers"] // 2,
            "vocab_size": 512,
        }
        tokens = (tokens[0], 64)
    config = LlamaConfig(**shape, use_cache=False, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    ids = torch.randint(shape["vocab_size"], tokens, device=device)

    def loss_fn(output: Any, target: torch.Tensor) -> torch.Tensor:
        return loss_of(output.logits, target)

    return Case(name, model, (ids,), ids, loss_fn, 8)


def convolutions(device: torch.device, small: bool) -> Case:
    images = torch.randn((4, 3, 32, 32) if small else (32, 3, 256, 256), device=device)
    images = images if device.type == "cpu" else images.bfloat16()
    target = torch.randint(1000, (len(images),), device=device)

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.float(), target)

    return Case("convolutions", Wide(8 if small else 64), (images,), target, loss_fn, 8)


CASES = {"like": llama_like, "hf": hugging_face, "conv": convolutions}


def compile_blocks(module: nn.Module, index: int) -> nn.Module:
    """Each block of a list is compiled."""
    for name, block in module.named_modules():
        parts = [part.isdecimal() for part in name.split(".")]
        if parts[-1] and sum(parts) == 1:
            block.compile()
    return module


WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"wrap": compile_blocks},
    "graph": {"backward": "graph"},
    "graph-compiled": {"backward": "graph", "compile": True},
    "graph-recompute": {"backward": "graph", "compile": True, "recompute": True},
}
"""Way -> the arguments of Driver that make it."""


class Bench:
    """A case, traced once, that is cut in many ways, for all processes or so many ranks."""

    def __init__(
        self, case: Case, device: torch.device, preset: str, ranks: int | None = None
    ) -> None:
        self.case = case
        self.ranks = ranks or dist.get_world_size()
        self.device = device
        self.preset = preset
        self.model = case.model
        program, self.bindings, _ = lower(case.model, case.args, {})
        names = [each.name for each in default_pipeline()]
        before = names.index(FindSplits.name)
        run_passes(program, default_pipeline()[:before])
        self.traced = text(program)
        self.flat = self.bindings.call.flatten(case.args, {})
        self.sizes = check_inputs(program.inputs, self.flat)

    def cut(self, positions: Sequence[int], recompute: bool = True) -> Pipe:
        pipe = cut_copy(self.traced, self.bindings, positions, recompute)
        pipe._sizes = self.sizes
        return pipe

    def setting(self, schedule: str, way: str, count: int) -> Setting:
        """How the stages run by a schedule on the ranks, in one of WAYS."""
        options = {name: of for name, of in WAYS[way].items() if name != "wrap"}
        ranks = self.ranks if SCHEDULES[schedule] > 1 else None
        return Setting(self.preset, schedule, count, ranks=ranks, **options)

    def estimated(self, way: str) -> Line:
        """The program as a line with the seconds that a roofline gives."""
        case = self.case
        setting = self.setting("ZBVZeroBubble", way, case.microbatches)
        program = parse(self.traced)
        loss = counted_loss(
            program, self.bindings.call, self.sizes, setting, case.loss_fn, case.target
        )
        return Line.of(program, setting, self.sizes, self.bindings, loss)

    def line(self, name: str) -> Line:
        """The program as a line with the seconds of its blocks, in one of WAYS."""
        line = self.estimated(name)
        wrap = WAYS[name].get("wrap")
        way = Way.before(line.loss, self.device, wrap, line.setting)
        trial = Trial(lambda cuts: self.cut(cuts, False), self.flat)
        spans = line.blocks()
        line.calibrate(spans, time_spans(line.ops, spans, trial, way, self.sizes))
        return line


def by_hand(edges: Sequence[int], stages: int, most: int) -> list[list[int]]:
    """Cuts between blocks: the equal ones, and those around them."""
    if len(edges) < stages - 1:
        raise SystemExit(f"{len(edges) + 1} blocks cannot make {stages} stages")
    equal = [round(len(edges) * (i + 1) / stages) for i in range(stages - 1)]
    found: list[list[int]] = []
    for distance in range(3 * len(equal) + 1):
        moves = _moves(len(equal), distance)
        for move in sorted(moves, key=lambda move: (len(set(move)), move)):
            places = [p + m for p, m in zip(equal, move, strict=True)]
            increasing = all(
                a < b for a, b in itertools.pairwise([-1, *places, len(edges)])
            )
            if increasing:
                found.append([edges[p] for p in places])
            if len(found) == most:
                return found
    return found


def _moves(cuts: int, distance: int) -> Iterator[tuple[int, ...]]:
    """The moves of so many cuts by up to 3 blocks each, and `distance` blocks in all."""
    if not cuts:
        if not distance:
            yield ()
        return
    for move in range(-3, 4):
        if abs(move) <= distance <= abs(move) + 3 * (cuts - 1):
            for rest in _moves(cuts - 1, distance - abs(move)):
                yield move, *rest


def rows(bench: Bench, options: argparse.Namespace) -> None:
    """Prints the table of a case."""
    for way in options.ways:
        begin = time.perf_counter()
        line = bench.line(way) if dist.get_rank() == 0 else None
        seconds = time.perf_counter() - begin
        for schedule in options.schedules:
            chosen: list[Any] = [None, None]
            if line is not None:
                chosen = _predicted(bench, line, schedule, way, options)
            dist.broadcast_object_list(chosen)
            measured = [
                _measured(bench, cut, schedule, way, options) for cut in chosen[0]
            ]
            if dist.get_rank() == 0:
                times = [m for m, _ in measured]
                _print(bench, schedule, way, chosen, times, seconds)
            if options.timeline and line is not None:
                _print_steps(measured[0][1], line, chosen[0][0])


def _predicted(
    bench: Bench, line: Line, schedule: str, way: str, options: argparse.Namespace
) -> list[Any]:
    """Cuts between blocks, and behind them the automatic one; the seconds of a step with each."""
    stages = dist.get_world_size() * SCHEDULES[schedule]
    setting = bench.setting(schedule, way, bench.case.microbatches)
    of_schedule = replace(line, setting=setting)
    policy = Balanced(stages, setting, budget=4.0, wrap=WAYS[way].get("wrap"))
    plan = policy.of_line(of_schedule)
    edges = [start for start, _ in line.blocks()[1:]]
    numbers = [int(number) for number in options.cuts if number != "all"]
    cuts = by_hand(edges, stages, numbers[0] if numbers else 6)
    if "all" in options.cuts and stages == 2:
        cuts = [[edge] for edge in edges]
    cuts.append(list(plan.cuts))
    ends = [[0, *cut, len(line.ops)] for cut in cuts]
    steps = policy.steps(of_schedule, stages, 1.0)
    return [cuts, steps.seconds(torch.tensor(ends)).tolist()]


def _measured(
    bench: Bench,
    cut: list[int],
    schedule: str,
    way: str,
    options: argparse.Namespace,
) -> tuple[float, Any]:
    """The median step of the slowest process, and a timeline."""
    case = bench.case
    pipe = bench.cut(cut)
    driver = Driver(
        pipe, schedule, case.microbatches, loss_fn=case.loss_fn, device=bench.device,
        return_outputs=False, compare_steps=1, share_losses=False, **WAYS[way],
    )  # fmt: skip
    args = [torch.cat([a] * case.microbatches) for a in case.args]
    target = torch.cat([case.target] * case.microbatches)
    taken: list[float] = []
    for _ in range(2 + options.repeats):
        dist.barrier()
        begin = _now(bench.device)
        driver.step(*args, target=target)
        seconds = torch.tensor([_now(bench.device) - begin], device=bench.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        taken.append(float(seconds))
    if driver.notes:
        raise SystemExit(f"{schedule}, {way}: {driver.notes}")
    timeline = None
    if options.timeline:
        with record(driver) as recording:
            driver.step(*args, target=target)
        timeline = recording.timeline
    for parameter in case.model.parameters():
        parameter.grad = None
    return median(taken[2:]), timeline


def _print(
    bench: Bench,
    schedule: str,
    way: str,
    chosen: list[Any],
    measured: list[float],
    seconds: float,
) -> None:
    cuts, predicted = chosen
    for cut, p, m in zip(cuts, predicted, measured, strict=True):
        name = "automatic" if cut is cuts[-1] else ",".join(map(str, cut))
        numbers = f"{1e3 * p:>9.1f}{1e3 * m:>9.1f}{p / m - 1:>8.3f}"
        print(
            f"{bench.case.name:14}{way:16}{schedule:17}{name:22}{numbers}", flush=True
        )
    hand = measured[:-1]
    print(
        f"{bench.case.name:14}{way:16}{schedule:17}ranks {spearman(predicted[:-1], hand):.3f}  "
        f"best by hand / automatic {min(hand) / measured[-1]:.3f}  timing of blocks took {seconds:.0f} s",
        flush=True,
    )


def _print_steps(timeline: Any, line: Line, cut: list[int]) -> None:
    """The seconds of each kind of step, predicted and measured."""
    ends = [0, *cut, len(line.ops)]
    for stage, (begin, end) in enumerate(itertools.pairwise(ends)):
        device, host = 1e3 * line.measured[..., begin:end].sum(2)
        shown = [f"{end - begin} ops"]
        for row, kind in enumerate("FBIW"):
            spans = [
                e.end - e.start
                for e in timeline.events
                if e.step.kind == kind and e.step.stage == stage
            ]
            if spans:
                measured = f"{1e3 * median(spans):.1f}"
                shown.append(
                    f"{kind} {device[row]:.1f} (host {host[row]:.1f}) | {measured}"
                )
        print(f"    stage {stage}: predicted | measured ms  {'   '.join(shown)}")


def _ranks(numbers: Sequence[float]) -> list[int]:
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return [order.index(i) for i in range(len(numbers))]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of two orders; 1 for equal ones, not a number for one alone."""
    if len(one) < 2:
        return math.nan
    pairs = zip(_ranks(one), _ranks(other), strict=True)
    n = len(one)
    return 1 - 6 * sum((x - y) ** 2 for x, y in pairs) / (n * (n * n - 1))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument(
        "--preset",
        help="a device of stagecut's; by the name of the card when not given",
    )
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--models", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=[*WAYS],
        default=["eager", "compiled"],
    )
    parser.add_argument(
        "--schedules", nargs="+", choices=[*SCHEDULES], default=[*SCHEDULES]
    )
    parser.add_argument(
        "--cuts",
        nargs="+",
        default=["6"],
        help='how many by hand, and "all" for each one between blocks where there are two stages',
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--timeline", action="store_true", help="steps of the first cut too"
    )
    options = parser.parse_args()
    cuda = options.device == "cuda"
    device = torch.device(
        options.device, int(os.environ["LOCAL_RANK"]) if cuda else None
    )
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    if dist.get_rank() == 0:
        card = torch.cuda.get_device_name() if cuda else "CPU"
        print(f"{dist.get_world_size()} x {card}, torch {torch.__version__}")
        print(
            f"{'model':14}{'way':16}{'schedule':17}{'cut':22}{'predicted':>9}{'measured':>9}{'error':>8}"
        )
    for name in options.models:
        torch.manual_seed(0)
        case = CASES[name](device, options.small)
        case.model.to(device, torch.bfloat16 if cuda else torch.float32)
        card = torch.cuda.get_device_name() if cuda else "CPU"
        preset = options.preset or next((n for n in DEVICES if n in card), "H100")
        rows(Bench(case, device, preset), options)
        del case
        torch.cuda.empty_cache()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
