"""Training and generation over N GPUs: schedules, ways of running a stage, cuts by hand and automatic ones.

torchrun --nproc-per-node 4 benchmarks/scaling.py --gpus 4
torchrun --nproc-per-node 8 benchmarks/scaling.py --gpus 8 --shard 2          # 4 ranks of a pipeline x FSDP2
torchrun --nproc-per-node 4 benchmarks/scaling.py --gpus 4 --device cpu --small    # tiny models, to try it
torchrun --nproc-per-node 1 benchmarks/scaling.py --gpus 8 --simulate    # blocks are timed alone

A step is forward and backward of all micro-batches, without an optimizer: it takes every row as long. A
micro-batch has two sequences of 2048. Seconds are those of the slowest process; medians are taken. All rows
of a model with so many micro-batches must have the same loss; the script ends with 1 where one has not.

`cut` is `equal` (as many blocks in each stage, embedding and head counted as one each) or `automatic` (what
Balanced finds from blocks that are timed on the first process, for N x 2 micro-batches) or, under schedules
that split backwards, `timed` (the same with order="timed", and the order for each number of micro-batches).
Ways that end in `-replayed` run in a CUDA graph. `bound` is the speed
over the best that the schedule allows: ranks x (one GPU alone) x (1 - bubble), with the formulas of
gpu_pipeline.py, and one GPU eager for `eager`, compiled for the others. `error` is the predicted step over
the measured one, less 1. `GiB` is the peak of each rank in a step; each process has all weights. With
--simulate, of a pipeline alone, nothing is measured but the blocks and one GPU: tokens/s are those of the
predicted step.

Generation: requests of one prompt of 128 tokens, 64 new ones, with CUDA graphs, so many in flight, beside
one request after the other on one GPU.
"""

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import generate
import torch
import torch.distributed as dist
import transformers
from gpu_pipeline import Size
from predictions import (
    LLAMA_1B,
    SCHEDULES,
    Bench,
    Case,
    by_hand,
    compile_blocks,
    hugging_face,
    llama_like,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from zero_bubble import DRIVERS, gathered, has_time, say

from stagecut import Balanced, Driver
from stagecut.backend.costs.line import Line
from stagecut.backend.costs.ops import DEVICES

LLAMA_3B = LLAMA_1B | {
    "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
}  # fmt: skip
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
}  # fmt: skip
LIKE_3B = Size(blocks=28, width=3072, heads=24, hidden=8192)
LIKE_9B = Size(blocks=44, width=4096, heads=32, hidden=11_264)
TOKENS = (2, 2048)

ORDER = (
    ("1F1B", "compiled"),
    ("ZBVZeroBubble", "graph-recompute"),
    ("Interleaved1F1B", "compiled"),
    ("1F1B", "graph-recompute"),
    ("1F1B", "eager"),
    ("ZBVZeroBubble", "eager"),
    ("Interleaved1F1B", "eager"),
    ("Interleaved1F1B", "graph-recompute"),
    ("ZBVZeroBubble", "compiled"),
    ("ZBVZeroBubble", "graph-compiled"),
    ("1F1B", "graph-compiled"),
    ("Interleaved1F1B", "graph-compiled"),
    ("1F1B", "compiled-replayed"),
    ("ZBVZeroBubble", "graph-recompute-replayed"),
    ("Interleaved1F1B", "compiled-replayed"),
)
"""The rows, the most important ones first."""

HEADER = (
    f"{'model':14}{'schedule':17}{'way':25}{'cut':10}{'mb':>4}{'tokens/s':>10}{'bound':>7}"
    f"{'predicted':>10}{'measured':>9}{'error':>8}{'loss':>10}   GiB"
)


def cases(gpus: int) -> dict[str, Callable[[torch.device, bool], Case]]:
    """The models for so many GPUs."""
    large = gpus > 4
    shape, size = (LLAMA_8B, LIKE_9B) if large else (LLAMA_3B, LIKE_3B)
    name = "Llama 3-8B" if large else "Llama 3.2-3B"
    return {
        "hf": lambda device, small: hugging_face(device, small, shape, TOKENS, name),
        "like": lambda device, small: llama_like(device, small, size),
    }


def bubble(schedule: str, ranks: int, count: int) -> float:
    """The part of a step in which a rank waits, for stages that are equal."""
    if schedule == "ZBVZeroBubble":
        return 0.0
    return (ranks - 1) / (SCHEDULES[schedule] * count + ranks - 1)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    schedule: str
    way: str
    cut: str
    count: int
    speed: float
    bound: float
    predicted: float
    measured: float | None = None
    loss: float = math.nan
    peaks: tuple[float, ...] = ()

    def __str__(self) -> str:
        names = f"{self.model:14}{self.schedule:17}{self.way:25}{self.cut:10}{self.count:>4}"
        speed = f"{self.speed:>10.0f}{self.speed / self.bound:>7.3f}"
        if self.measured is None:
            return f"{names}{speed}{1e3 * self.predicted:>10.1f}"
        error = self.predicted / self.measured - 1
        step = f"{1e3 * self.predicted:>10.1f}{1e3 * self.measured:>9.1f}{error:>8.3f}"
        peaks = " ".join(f"{gib:.1f}" for gib in self.peaks)
        return f"{names}{speed}{step}{self.loss:>10.4f}   {peaks}"


class Table:
    """The rows of one model."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self.bench = bench
        self.options = options
        self.rows: list[Row] = []
        self._lines: dict[str, Line] = {}
        self._alone: dict[bool, float] = {}
        self._group = self._data = None
        if options.shard > 1:
            mesh = init_device_mesh(
                options.device,
                (options.shard, bench.ranks),
                mesh_dim_names=("data", "pipe"),
            )
            self._group, self._data = mesh.get_group("pipe"), mesh["data"]

    def measure_alone(self) -> None:
        """One GPU is measured, eager, then compiled."""
        for compiled in (False, True):
            speed = [0.0]
            if dist.get_rank() == 0:
                speed[0] = self._speed_alone(compiled)
            dist.broadcast_object_list(speed)
            self._alone[compiled] = speed[0]
            way = "compiled" if compiled else "eager"
            name = f"{self.bench.case.name:14}{'one GPU':17}{way:25}"
            say(f"{name}{'':10}{4:>4}{speed[0]:>10.0f}")

    def _speed_alone(self, compiled: bool) -> float:
        """Tokens a second of four micro-batches on this process."""
        case = self.bench.case
        if compiled:
            compile_blocks(case.model, 0)
        seconds: list[float] = []
        for _ in range(2 + self.options.repeats):
            begin = self._now()
            for _ in range(4):
                case.loss_fn(case.model(*case.args), case.target).backward()
            seconds.append(self._now() - begin)
            case.model.zero_grad()
        self._clean()
        return 4 * case.target.numel() / median(seconds[2:])

    def measure(self, schedule: str, way: str) -> Iterator[Row]:
        """The rows of a schedule in one way, for each cut and each number of micro-batches."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            found[0] = self._predicted(schedule, way)
        dist.broadcast_object_list(found)
        for name, (cut, plans) in found[0].items():
            if self.options.simulate:
                yield from self._simulated(
                    (schedule, way, name), [seconds for seconds, _ in plans]
                )
                continue
            pipe = self.bench.cut(cut)
            graphs: Any = None
            for count, (seconds, order) in zip(
                self.options.microbatches, plans, strict=True
            ):
                driver = Driver(
                    pipe, schedule, count, loss_fn=self.bench.case.loss_fn,
                    group=self._group, device=self.bench.device, return_outputs=False,
                    compare_steps=1, order=order, **self._options(way),
                )  # fmt: skip
                # so that the functions of a stage are made once
                if graphs is not None:
                    driver._graphs = graphs
                graphs = driver._graphs
                yield self._row(driver, (schedule, way, name, count), seconds)
            del pipe, driver, graphs
            self._clean()

    def _simulated(
        self, names: tuple[str, str, str], steps: Sequence[float]
    ) -> Iterator[Row]:
        """The rows of a cut, from the seconds of a step for each number of micro-batches."""
        for count, seconds in zip(self.options.microbatches, steps, strict=True):
            tokens = count * self.bench.case.target.numel()
            bound = self._bound(names[0], names[1], count)
            yield Row(
                self.bench.case.name, *names, count, tokens / seconds, bound, seconds
            )

    def _bound(self, schedule: str, way: str, count: int) -> float:
        """The tokens a second that the schedule allows."""
        free = 1 - bubble(schedule, self.bench.ranks, count)
        compiled = not way.startswith("eager")
        return self.bench.ranks * self._alone[compiled] * free

    def _options(self, way: str) -> dict[str, Any]:
        """The arguments of Driver."""
        options = dict(DRIVERS[way])
        if self._data is None:
            return options
        inner = options.get("wrap", lambda module, index: module)
        data = self._data

        def wrap(module: nn.Module, index: int) -> nn.Module:
            return fully_shard(inner(module, index), mesh=data)

        return options | {"wrap": wrap}

    def _predicted(
        self, schedule: str, way: str
    ) -> dict[str, tuple[list[int], list[Any]]]:
        """The cuts by name, each with the seconds of a step, and its order where it is not the schedule's
        own, for each number of micro-batches.
        """
        way = way.removesuffix("-replayed")
        if way not in self._lines:
            begin = time.perf_counter()
            self._lines[way] = self.bench.line(way)
            say(f"{way}: blocks timed in {time.perf_counter() - begin:.0f} s")
        timed = self._lines[way]
        stages = self.bench.ranks * SCHEDULES[schedule]
        setting = self.bench.setting(schedule, way, 2 * self.bench.ranks)
        policy = Balanced(stages, setting, budget=4.0, wrap=DRIVERS[way].get("wrap"))
        edges = [start for start, _ in timed.blocks()[1:]]
        equal = by_hand(edges, stages, 1)[0]
        chosen = list(policy.of_line(replace(timed, setting=setting)).cuts)
        say(f"{schedule}, {way}: equal {equal}, automatic {chosen}")
        cuts = {"equal": equal, "automatic": chosen}
        if equal == chosen:
            cuts = {"both": equal}
        if setting.splits:
            plan = replace(policy, order="timed").of_line(
                replace(timed, setting=setting)
            )
            cuts["timed"] = list(plan.cuts)
            say(f"timed {cuts['timed']}")
        rows: dict[str, tuple[list[int], list[Any]]] = {}
        for name, cut in cuts.items():
            ends = torch.tensor([[0, *cut, len(timed.ops)]])
            plans: list[Any] = []
            for count in self.options.microbatches:
                setting = self.bench.setting(schedule, way, count)
                line = replace(timed, setting=setting)
                steps = replace(policy, setting=setting).steps(line, stages, 1.0)
                if name == "timed":
                    setting = steps.timed(ends[0].tolist())
                    steps = replace(policy, setting=setting).steps(line, stages, 1.0)
                plans.append((float(steps.seconds(ends)), setting.order))
            rows[name] = (cut, plans)
        return rows

    def _row(
        self, driver: Driver, names: tuple[str, str, str, int], predicted: float
    ) -> Row:
        case = self.bench.case
        schedule, way, _, count = names
        args = [torch.cat([a.roll(i, -1) for i in range(count)]) for a in case.args]
        target = torch.cat([case.target.roll(i, -1) for i in range(count)])
        seconds: list[float] = []
        loss = peaks = None
        # a step is recorded as its third, and replayed from then on
        warm = 4 if way.endswith("-replayed") else 2
        for _ in range(warm + self.options.repeats):
            taken, loss, peaks = self._once(driver, args, target)
            seconds.append(taken)
        if driver.notes:
            raise SystemExit(f"{names}: {driver.notes}")
        step = median(seconds[warm:])
        tokens = count * case.target.numel()
        bound = self._bound(schedule, way, count)
        return Row(
            case.name, *names, tokens / step, bound, predicted, step, loss, peaks
        )

    def _once(self, driver: Driver, args: Any, target: Any) -> tuple[float, Any, Any]:
        """The seconds of one step, its loss, and the peak of each process in GiB."""
        cuda = self.bench.device.type == "cuda"
        dist.barrier()
        begin = self._now()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        _, losses = driver.step(*args, target=target)
        seconds = self._now() - begin
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        for parameter in driver.parameters():
            parameter.grad = None
        everywhere = gathered((seconds, peak))
        longest = max(each for each, _ in everywhere)
        return longest, float(losses.batch), tuple(each for _, each in everywhere)

    def differing(self) -> list[str]:
        """The measured rows whose loss is not that of the first row with as many micro-batches."""
        if self.options.simulate:
            return []
        part = 2.0**-7 if self.bench.device.type == "cuda" else 1e-4
        first: dict[int, Row] = {}
        for row in self.rows:
            first.setdefault(row.count, row)
        return [
            f"DIFFERS: {row}"
            for row in self.rows
            # not a number is far from every number
            if not abs(row.loss - first[row.count].loss) <= part * first[row.count].loss
        ]

    def _now(self) -> float:
        if self.bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _clean(self) -> None:
        gc.collect()
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()


def train(options: argparse.Namespace, device: torch.device, began: float) -> list[str]:
    """Prints the rows of training; those that differ."""
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name() if cuda else "H100"
    preset = next((n for n in DEVICES if n in card), "H100")
    differing: list[str] = []
    say(HEADER)
    for name in options.models:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
        with device:
            case = cases(options.gpus)[name](device, options.small)
        torch.set_default_dtype(torch.float32)
        table = Table(
            Bench(case, device, preset, options.gpus // options.shard), options
        )
        table.measure_alone()
        for schedule, way in ORDER:
            if schedule not in options.schedules or way not in options.ways:
                continue
            if not has_time(options, began):
                say(f"{schedule}, {way}: left out, the time is over")
                continue
            for row in table.measure(schedule, way):
                table.rows.append(row)
                say(str(row))
        differing += table.differing()
        del case, table
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return differing


def serve(options: argparse.Namespace) -> None:
    """Prints the tokens a second of requests on one GPU and over all."""
    name = "8B" if options.gpus > 4 else "3B"
    options.new, options.dtype, options.meta = 64, "bfloat16", False
    options.requests = max(options.lanes)
    bench = generate.Bench(name, options)
    graphs = {"cuda_graphs": options.device == "cuda", "compile": options.compile}
    if dist.get_rank() == 0:
        alone = generate.Generator(
            bench.model(bench.device), stages=1, max_length=192, **graphs
        )
        bench.lanes("one GPU", alone, 1)
        del alone
    gc.collect()
    dist.barrier()
    generator = generate.Generator(
        bench.model(bench.device),
        group=dist.group.WORLD,
        device=bench.device,
        max_length=192,
        **graphs,
    )
    for lanes in options.lanes:
        bench.lanes(f"{options.gpus} stages", generator, lanes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--shard", type=int, default=1, help="FSDP2 over so many")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--models", nargs="*", choices=["hf", "like"], default=["hf"])
    parser.add_argument(
        "--schedules", nargs="+", choices=[*SCHEDULES], default=[*SCHEDULES]
    )
    ways = ["eager", "compiled", "graph-recompute"]
    parser.add_argument("--ways", nargs="+", choices=[*DRIVERS], default=ways)
    parser.add_argument(
        "--microbatches", nargs="+", type=int, help="N, 2 N and 4 N by default"
    )
    parser.add_argument(
        "--lanes", nargs="*", type=int, default=[1, 4, 16], help="requests in flight"
    )
    parser.add_argument(
        "--compile", action="store_true", help="generation by compiled stages"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="on one GPU: steps are not run"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no more rows after so many"
    )
    options = parser.parse_args()
    if options.simulate and options.shard > 1:
        parser.error("--simulate knows nothing of --shard: leave one of them away")
    began = time.perf_counter()
    ranks = options.gpus // options.shard
    options.microbatches = options.microbatches or [ranks, 2 * ranks, 4 * ranks]
    if options.shard > 1:
        options.ways = [way for way in options.ways if "graph" not in way]
    cuda = options.device == "cuda"
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device(options.device, local if cuda else None)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    processes = 1 if options.simulate else options.gpus
    if dist.get_world_size() != processes:
        raise SystemExit(
            f"{processes} processes are needed, and there are {dist.get_world_size()}"
        )
    transformers.logging.set_verbosity_error()
    card = torch.cuda.get_device_name() if cuda else "CPU"
    say(f"{options.gpus} x {card}, torch {torch.__version__}, {vars(options)}")
    differing = train(options, device, began)
    if options.lanes and not options.simulate:
        serve(options)
    say(
        f"{time.perf_counter() - began:.0f} s; "
        + ("; ".join(differing) or "losses are the same")
    )
    dist.destroy_process_group()
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
