"""Tokens per second of zero-bubble schedules beside 1F1B, by the backward of autograd and by that of graphs.

torchrun --nproc-per-node 2 benchmarks/zero_bubble.py
torchrun --nproc-per-node 2 benchmarks/zero_bubble.py --device cpu --small    # tiny models, to try the script

A step is forward and backward of all micro-batches and AdamW. Its learning rate is zero, so that all rows of
a model keep the same weights, which they share. With so many micro-batches they must have the same loss and
the same norm of the gradients; the script ends with 1 where one has not. Times are those of the slower
process; medians are taken.

ways    eager             the backward is autograd's
        compiled          the same, and each block is compiled
        stages            the same, and each stage is compiled as a whole
        graph             Driver(backward="graph")
        graph-compiled    Driver(backward="graph", compile=True)
        graph-recompute   Driver(backward="graph", compile=True, recompute=True)
    ...-replayed      the same, with cuda_graphs=True

All ways of a schedule have the same cut between blocks, and all numbers of micro-batches: that which Balanced
finds from blocks that are timed on the first process, compiled, for ZBVZeroBubble with the compiled graph
backward; or with --cut equal, the one between equally many blocks. With --order timed, Balanced finds an
order of steps as well where a schedule splits backwards, and one for each number of micro-batches. The loss
is not compiled in any way.
`ratio` is to the best of `compiled` and `stages` under 1F1B with as many micro-batches; `first` the seconds
of the first step, in which functions are made and compiled; `GiB` what a step takes on each process beyond
weights and optimizer. At the end, if there is time, the compiled graphs alternate with that best 1F1B, and
`pairs` is the median ratio of neighbours, with the least and the largest.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from predictions import CASES, SCHEDULES, WAYS, Bench, by_hand
from torch import nn

from stagecut import Balanced, Driver
from stagecut.backend.costs.line import Line
from stagecut.backend.costs.ops import DEVICES
from stagecut.ir.graph import scope_fqn


def compile_stage(module: nn.Module, index: int) -> nn.Module:
    """The stage is compiled as a whole."""
    module.compile()
    return module


RECORDED = ("eager", "compiled", "graph-recompute")
"""The ways that run in a CUDA graph too."""

DRIVERS: dict[str, dict[str, Any]] = {**WAYS, "stages": {"wrap": compile_stage}} | {
    f"{way}-replayed": WAYS[way] | {"cuda_graphs": True} for way in RECORDED
}
"""Way -> the arguments of Driver that make it."""

ORDER = (
    ("1F1B", "compiled"),
    ("ZBVZeroBubble", "graph-compiled"),
    ("1F1B", "graph-compiled"),
    ("1F1B", "stages"),
    ("ZBVZeroBubble", "graph-recompute"),
    ("1F1B", "graph-recompute"),
    ("Interleaved1F1B", "compiled"),
    ("Interleaved1F1B", "graph-compiled"),
    ("1F1B", "eager"),
    ("ZBVZeroBubble", "eager"),
    ("ZBVZeroBubble", "graph"),
    ("1F1B", "graph"),
    ("Interleaved1F1B", "eager"),
    ("Interleaved1F1B", "graph"),
    ("ZBVZeroBubble", "compiled"),
    ("Interleaved1F1B", "stages"),
    ("ZBVZeroBubble", "stages"),
    ("Interleaved1F1B", "graph-recompute"),
    *(
        (schedule, f"{way}-replayed")
        for way in RECORDED
        for schedule in ("1F1B", "ZBVZeroBubble", "Interleaved1F1B")
    ),
)
"""The rows, the most important ones first."""

COMPILED = ("compiled", "stages")
"""The ways of autograd with which graphs are compared."""

GRAPHS = ("graph-compiled", "graph-recompute")
"""The ways that are compared with them in turn."""

ROUNDING = {torch.bfloat16: 2.0**-7, torch.float32: 1e-4}
"""The part by which losses and norms may differ."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    schedule: str
    way: str
    count: int
    speed: float
    loss: float
    norm: float
    first: float
    taken: tuple[float, ...]

    def line(self, best: "Row | None") -> str:
        """The row as text, with its ratio to the best compiled 1F1B where that is known."""
        names = f"{self.model:14}{self.schedule:17}{self.way:25}{self.count:>4}"
        ratio = f"{self.speed / best.speed:>8.3f}" if best else f"{'-':>8}"
        numbers = f"{self.speed:>12.0f}{ratio}{self.loss:>12.5f}{self.norm:>12.5f}"
        taken = " ".join(f"{gib:.2f}" for gib in self.taken)
        return f"{names}{numbers}{self.first:>8.1f}   {taken}"


HEADER = (
    f"{'model':14}{'schedule':17}{'way':25}{'mb':>4}"
    f"{'tokens/s':>12}{'ratio':>8}{'loss':>12}{'norm':>12}{'first':>8}   GiB"
)


class Table:
    """The rows of one model."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self.bench = bench
        self.options = options
        self.rows: list[Row] = []
        self.differing: list[str] = []
        self.steps: dict[tuple[str, str, int], Callable[[], float]] = {}
        self._cuts: dict[str, tuple[list[int], dict[int, Any]]] = {}
        self._lines: dict[str, Line] = {}
        parameters = bench.model.parameters()
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        self._dtype = next(bench.model.parameters()).dtype

    def find_cuts(self) -> None:
        """The first process finds a cut for each schedule, and all know it."""
        found: list[Any] = [{}]
        if dist.get_rank() == 0:
            for schedule in self.options.schedules:
                found[0][schedule] = self._cut(schedule)
        dist.broadcast_object_list(found)
        self._cuts = found[0]

    def _cut(self, schedule: str) -> tuple[list[int], dict[int, Any]]:
        """The cut, and for each number of micro-batches the order of steps, None for the schedule's own."""
        way = "graph-compiled" if schedule == "ZBVZeroBubble" else "compiled"
        line = self._line(way)
        stages = dist.get_world_size() * SCHEDULES[schedule]
        starts = [start for start, _ in line.blocks()]
        orders: dict[int, Any] = dict.fromkeys(self.options.microbatches)
        if self.options.cut == "equal":
            cut = by_hand(starts[1:], stages, 1)[0]
        else:
            count = max(self.options.microbatches)
            setting = self.bench.setting(schedule, way, count)
            wrap = WAYS[way].get("wrap")
            policy = Balanced(
                stages, setting, budget=4.0, wrap=wrap, inside="never",
                order=self.options.order,
            )  # fmt: skip
            plan = policy.of_line(replace(line, setting=setting))
            cut = list(plan.cuts)
            if plan.order is not None:
                ends = [0, *cut, len(line.ops)]
                for n in orders:
                    counted = self.bench.setting(schedule, way, n)
                    steps = replace(policy, setting=counted).steps(line, stages, 1.0)
                    orders[n] = steps.timed(ends).order
        firsts = [scope_fqn(line.ops[start].scope) for start in [0, *cut]]
        say(f"{schedule}: stages begin at {', '.join(firsts)}")
        return cut, orders

    def _line(self, way: str) -> Line:
        if self.options.cut == "equal":
            way = ""
        if way not in self._lines:
            timed = self.bench.line(way) if way else self.bench.estimated("eager")
            self._lines[way] = timed
        return self._lines[way]

    def measure(self, schedule: str, way: str) -> Iterator[Row]:
        """The rows of a schedule in one way, for each number of micro-batches."""
        cut, orders = self._cuts[schedule]
        pipe = self.bench.cut(cut)
        graphs: Any = None
        for count in self.options.microbatches:
            driver = Driver(
                pipe,
                schedule,
                count,
                loss_fn=self.bench.case.loss_fn,
                device=self.bench.device,
                return_outputs=False,
                share_losses=False,
                compare_steps=1,
                order=orders[count],
                **DRIVERS[way],
            )
            # so that the functions of a stage are made once
            if graphs is not None:
                driver._graphs = graphs
            graphs = driver._graphs
            yield self._row(driver, schedule, way, count)

    def _row(self, driver: Driver, schedule: str, way: str, count: int) -> Row:
        case = self.bench.case
        args = [
            torch.cat([self._varied(a, i) for i in range(count)]) for a in case.args
        ]
        target = torch.cat([self._varied(case.target, i) for i in range(count)])
        _, _, first = self._checked(driver, args, target)
        if driver.notes:
            raise SystemExit(f"{schedule}, {way}: {driver.notes}")
        seconds: list[float] = []
        taken: list[float] = []
        # a step is recorded as its third, and replayed from then on
        warm = 3 if way.endswith("-replayed") else 1
        for _ in range(warm + self.options.repeats):
            elapsed, taken = self._once(driver, args, target)
            seconds.append(elapsed)
        # of a step as it is at the end, replayed for one
        loss, norm, _ = self._checked(driver, args, target)
        tokens = count * case.target.numel()
        if way in (*COMPILED, *GRAPHS):
            self.steps[schedule, way, count] = lambda: self._once(driver, args, target)[
                0
            ]
        return Row(
            case.name,
            schedule,
            way,
            count,
            tokens / median(seconds[warm:]),
            loss,
            norm,
            first,
            tuple(taken),
        )

    def _varied(self, tensor: torch.Tensor, microbatch: int) -> torch.Tensor:
        """Other data for each micro-batch, the same on all processes."""
        return tensor.roll(microbatch, -1).flip(-1) if microbatch % 2 else tensor

    def _checked(
        self, driver: Driver, args: Sequence[torch.Tensor], target: torch.Tensor
    ) -> tuple[float, float, float]:
        """The loss of a step, the norm of its gradients, and its seconds."""
        begin = time.perf_counter()
        _, losses = driver.step(*args, target=target)
        norm = self._norm(driver.parameters())
        seconds = time.perf_counter() - begin
        self._optimizer.zero_grad()
        loss = (
            float(losses.batch) if driver.is_last and losses.batch is not None else None
        )
        everywhere = gathered((loss, seconds))
        known = [each for each, _ in everywhere if each is not None]
        return known[0], norm, max(each for _, each in everywhere)

    def _norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """The norm of all gradients, summed in float32."""
        total = torch.zeros((), device=self.bench.device)
        for parameter in parameters:
            if parameter.grad is not None:
                total += parameter.grad.float().square().sum()
        dist.all_reduce(total)
        return float(total.sqrt())

    def _once(
        self, driver: Driver, args: Sequence[torch.Tensor], target: torch.Tensor
    ) -> tuple[float, list[float]]:
        """The seconds of one step, and the GiB that it takes on each process."""
        cuda = self.bench.device.type == "cuda"
        held = 0
        dist.barrier()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        driver.step(*args, target=target)
        if self.options.optimizer == "adamw":
            self._optimizer.step()
        self._optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        taken = torch.cuda.max_memory_allocated() - held if cuda else 0
        everywhere = gathered((seconds, taken / 2**30))
        return max(each for each, _ in everywhere), [each for _, each in everywhere]

    def best(self, count: int) -> Row | None:
        """The best compiled 1F1B with so many micro-batches, if there is one yet."""
        rows = [
            row
            for row in self.rows
            if row.count == count and row.schedule == "1F1B" and row.way in COMPILED
        ]
        return max(rows, key=lambda row: row.speed, default=None)

    def pairs(self, count: int) -> None:
        """Prints how compiled graphs do in turn with the best compiled 1F1B."""
        best = self.best(count)
        if best is None:
            return
        baseline = self.steps["1F1B", best.way, count]
        for (schedule, way, of_count), step in self.steps.items():
            if way not in GRAPHS or of_count != count:
                continue
            ratios: list[float] = []
            for turn in range(1 + self.options.pairs):
                order = (baseline, step) if turn % 2 else (step, baseline)
                seconds = {each: each() for each in order}
                ratios.append(seconds[baseline] / seconds[step])
            ratios = sorted(ratios[1:])
            spread = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            names = f"{best.model:14}{schedule:17}{way:25}{count:>4}"
            say(f"{names}   pairs with 1F1B {best.way}: {spread}")

    def add(self, row: Row) -> None:
        """The row is in the table, and is compared with the first one of as many micro-batches."""
        self.rows.append(row)
        first = next(other for other in self.rows if other.count == row.count)
        say(row.line(self.best(row.count)))
        for name in ("loss", "norm"):
            own, other = getattr(row, name), getattr(first, name)
            # not a number is far from every number
            if not abs(own - other) <= ROUNDING[self._dtype] * abs(other):
                text = f"{row.schedule}, {row.way}, {row.count}: {name} {own} and not {other}"
                self.differing.append(text)
                say(f"DIFFERS: {text}")


def gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return everywhere


def say(text: str) -> None:
    """The first process prints it at once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def fill(table: Table, options: argparse.Namespace, began: float) -> None:
    """Measures the rows that are wanted, as long as there is time."""
    table.find_cuts()
    for schedule, way in ORDER:
        if schedule not in options.schedules or way not in options.ways:
            continue
        if not has_time(options, began):
            say(f"{schedule}, {way}: left out, the time is over")
            continue
        for row in table.measure(schedule, way):
            table.add(row)
        gc.collect()
        if table.bench.device.type == "cuda":
            torch.cuda.empty_cache()


def finish(table: Table, options: argparse.Namespace, began: float) -> None:
    """The table in order, with all ratios, and pairs."""
    say(f"\n{HEADER}")
    for count in sorted({row.count for row in table.rows}):
        rows = [row for row in table.rows if row.count == count]
        for row in sorted(rows, key=lambda row: (row.schedule, row.way)):
            say(row.line(table.best(count)))
    say("")
    for count in options.microbatches:
        if options.pairs and has_time(options, began):
            table.pairs(count)


def has_time(options: argparse.Namespace, began: float) -> bool:
    """The same answer on all processes."""
    spent = max(gathered(time.perf_counter() - began))
    return spent < 60 * options.minutes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--preset", help="a device of stagecut's; by the card otherwise"
    )
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--models", nargs="+", choices=[*CASES], default=["like", "hf"])
    parser.add_argument(
        "--schedules", nargs="+", choices=[*SCHEDULES], default=[*SCHEDULES]
    )
    parser.add_argument(
        "--ways", nargs="+", choices=[*DRIVERS], default=[*WAYS, "stages"]
    )
    parser.add_argument("--microbatches", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--cut", choices=["automatic", "equal"], default="automatic")
    parser.add_argument("--order", choices=["schedule", "timed"], default="schedule")
    parser.add_argument("--optimizer", choices=["adamw", "none"], default="adamw")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=7, help="0 for none")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no more rows after so many"
    )
    options = parser.parse_args()
    began = time.perf_counter()
    cuda = options.device == "cuda"
    device = torch.device(
        options.device, int(os.environ["LOCAL_RANK"]) if cuda else None
    )
    if cuda:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    card = torch.cuda.get_device_name() if cuda else "CPU"
    say(f"{dist.get_world_size()} x {card}, torch {torch.__version__}, {vars(options)}")
    say(HEADER)
    differing: list[str] = []
    for name in options.models:
        torch.manual_seed(0)
        with device:
            case = CASES[name](device, options.small)
        case.model.to(device, torch.bfloat16 if cuda else torch.float32)
        preset = options.preset or next((n for n in DEVICES if n in card), "H100")
        table = Table(Bench(case, device, preset), options)
        fill(table, options, began)
        finish(table, options, began)
        differing += table.differing
        del case, table
        gc.collect()
    say(
        f"{time.perf_counter() - began:.0f} s; "
        + ("; ".join(differing) or "losses and norms are the same")
    )
    dist.destroy_process_group()
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
