"""Training throughput of a Llama-like model of a billion parameters over two GPUs: stagecut's stages, stages
cut by hand, one GPU.

python benchmarks/gpu_pipeline.py --out result.json      # on 2 GPUs; torchrun starts it, or it starts itself
python benchmarks/gpu_pipeline.py --device cpu --small   # a tiny model, to try the script

A step is forward and backward of all micro-batches and AdamW. Its learning rate is zero, so that all variants
keep the same weights, which they share, and must have the same loss; the script ends with 1 if they do not.
Variants of a row alternate, their times are those of the slowest process, medians are taken; `stagecut/hand`
is the median of the ratios of neighbours.

A schedule can reach at best `bound` = GPUs x (one GPU alone) x (1 - bubble), for p GPUs, m micro-batches:
    GPipe, 1F1B         bubble = (p - 1) / (m + p - 1)      Narayanan et al. 2021 (arXiv 2104.04473), 2.2.1
    Interleaved1F1B     bubble = (p - 1) / (v m + p - 1)    2.2.2, with v stages on a GPU
    ZBVZeroBubble       bubble = 0                          Qi et al. 2024 (arXiv 2401.10241), section 6
It counts stages as equal, though the head is more than a block, and communication and the optimizer as
nothing. Memory is what a step takes beyond weights and optimizer state.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    get_schedule_class,
)

from stagecut import SplitPoint, pipeline
from stagecut.backend.ranks.placement import placement

Step = Callable[[], float]


@dataclass(frozen=True)
class Size:
    """A model, its micro-batches, and how often a step is timed."""

    blocks: int = 16
    width: int = 2048
    heads: int = 16
    hidden: int = 5632
    vocabulary: int = 32_000
    length: int = 2048
    batch: int = 2
    warm_up: int = 2
    repeats: int = 7
    microbatches: tuple[int, int] = (16, 32)


SMALL = Size(8, 32, 2, 64, 128, 16, 2, 1, 3, (4, 8))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.RMSNorm(size.width, 1e-5)
        self.mlp_norm = nn.RMSNorm(size.width, 1e-5)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.projection = nn.Linear(size.width, size.width, bias=False)
        self.gate, self.up = (
            nn.Linear(size.width, size.hidden, bias=False) for _ in range(2)
        )
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self.qkv(self.attention_norm(x))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(q, rope), rotate(k, rope), v, is_causal=True
        )
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    cos, sin = rope
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)


class Llama(nn.Module):
    """The whole model, or a part of one: `part` shares the modules."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        half = size.width // size.heads // 2
        angles = torch.outer(
            torch.arange(size.length), 10_000.0 ** (-torch.arange(half) / half)
        )
        self.register_buffer(
            "rope", torch.stack((angles.cos(), angles.sin())), persistent=False
        )
        self.embedding: nn.Module | None = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.head: nn.Module | None = nn.Sequential(
            nn.RMSNorm(size.width, 1e-5),
            nn.Linear(size.width, size.vocabulary, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x, self.rope)
        return self.head(x) if self.head is not None else x

    def part(self, start: int, stop: int) -> "Llama":
        """Blocks start to stop, as one cuts by hand."""
        part = Llama.__new__(Llama)
        nn.Module.__init__(part)
        part.register_buffer("rope", self.rope, persistent=False)
        part.embedding = self.embedding if start == 0 else None
        part.blocks = self.blocks[start:stop]
        part.head = self.head if stop == len(self.blocks) else None
        return part


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class ByHand(PipelineStage):
    """torch 2.11 exchanges a greeting with neighbouring stages also where both are in one process; gloo
    refuses this.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [
            op
            for op in super()._get_init_p2p_neighbors_ops()
            if op.peer != dist.get_rank()
        ]


class Bench:
    """The model and the data of one process, and the steps that can be timed."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)
        with device:
            self.model = Llama(size).to(
                torch.bfloat16 if device.type == "cuda" else torch.float32
            )
            shape = (size.batch * max(size.microbatches), size.length)
            self.tokens, self.target = (
                torch.randint(size.vocabulary, shape) for _ in range(2)
            )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self._pipes: dict[int, Any] = {}

    def pipe(self, stages: int) -> Any:
        """The model cut by stagecut."""
        if stages not in self._pipes:
            cuts = {
                f"blocks.{self.size.blocks * i // stages}": SplitPoint.BEGINNING
                for i in range(1, stages)
            }
            self._pipes[stages] = pipeline(
                self.model,
                (self.tokens[: self.size.batch],),
                split_spec=cuts,
                check=None,
            )
        return self._pipes[stages]

    def ours(self, index: int, stages: int) -> PipelineStage:
        return self.pipe(stages).build_stage(index, self.device)

    def by_hand(self, index: int, stages: int) -> PipelineStage:
        part = self.model.part(
            *(self.size.blocks * i // stages for i in (index, index + 1))
        )
        return ByHand(part, index, stages, self.device)

    def piped(
        self,
        schedule: str,
        count: int,
        make: Callable[[int, int], PipelineStage],
        compiled: str,
    ) -> Step:
        """A step under a schedule with so many micro-batches; returns the loss, nan where the last stage is
        not.
        """
        kind = get_schedule_class(schedule)
        single = issubclass(kind, PipelineScheduleSingle)
        total = self.ranks if single else 2 * self.ranks
        stages = [
            make(i, total)
            for i, home in enumerate(placement(total, self.ranks, kind))
            if home == self.rank
        ]
        for stage in stages:
            compile_in_place(stage.submod, compiled)
        runner = kind(stages[0] if single else stages, count, loss_fn=loss_of)  # type: ignore[arg-type]
        given = self.size.batch * count
        inputs = (self.tokens[:given],) if any(s.is_first for s in stages) else ()

        def step() -> float:
            losses: list[torch.Tensor] = []
            last = (
                {"target": self.target[:given], "losses": losses}
                if any(s.is_last for s in stages)
                else {}
            )
            runner.step(*inputs, **last, return_outputs=False)
            self._update()
            return torch.stack(losses).mean().item() if losses else float("nan")

        return step

    def alone(self, count: int, compiled: str) -> Step:
        """The same step on one GPU, the first; the others wait."""
        compile_in_place(self.model, compiled)

        def step() -> float:
            if self.rank:
                return float("nan")
            losses = []
            for tokens, target in zip(
                self.tokens.split(self.size.batch),
                self.target.split(self.size.batch)[:count],
                strict=False,
            ):
                loss = loss_of(self.model(tokens), target)
                (loss / count).backward()
                losses.append(loss.detach())
            self._update()
            return torch.stack(losses).mean().item()

        return step

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, variants: dict[str, Step]) -> dict[str, Any]:
        """By variant: seconds of each repeat, the loss, and bytes taken on each process."""
        found: dict[str, Any] = {
            name: {"seconds": [], "loss": 0.0, "bytes": []} for name in variants
        }
        for repeat in range(self.size.warm_up + self.size.repeats):
            for name in list(variants)[:: -1 if repeat % 2 else 1]:
                seconds, loss, taken = self._once(variants[name])
                if repeat >= self.size.warm_up:
                    found[name]["seconds"].append(seconds)
                found[name] |= {"loss": loss, "bytes": taken}
        return found

    def _once(self, step: Step) -> tuple[float, float, list[int]]:
        held = 0
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        loss = step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        taken = (
            torch.cuda.max_memory_allocated() - held
            if self.device.type == "cuda"
            else 0
        )
        everywhere: list[Any] = [None] * self.ranks
        dist.all_gather_object(everywhere, (seconds, loss, taken))
        return (
            max(e[0] for e in everywhere),
            next(e[1] for e in everywhere if e[1] == e[1]),
            [e[2] for e in everywhere],
        )

    def _wait(self) -> None:
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def agreed(self, question: bool) -> bool:
        """The answer of the first process."""
        answer = [question]
        dist.broadcast_object_list(answer)
        return answer[0]


def compile_in_place(module: nn.Module, what: str) -> None:
    """Compiles nothing, each block, or the whole. Compiled code of an earlier row is dropped."""
    for part in module.modules():
        part._compiled_call_impl = None
    if what == "blocks":
        for block in module.get_submodule("blocks").children():
            block.compile()
    elif what == "stages":
        module.compile()


def bubble(schedule: str, ranks: int, count: int) -> float:
    """The part of a step in which a GPU waits; sources above."""
    if schedule == "ZBVZeroBubble":
        return 0.0
    chunks = 2 if schedule == "Interleaved1F1B" else 1
    return (ranks - 1) / (chunks * count + ranks - 1)


def rows(size: Size) -> list[tuple[str, int, str]]:
    """Schedule, micro-batches, what is compiled: the most important rows first, those that take most memory
    last.
    """
    few, many = size.microbatches
    eager = [
        (s, few, "") for s in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "GPipe")
    ]
    eager += [(s, many, "") for s in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")]
    return [
        *eager,
        ("1F1B", few, "blocks"),
        ("1F1B", few, "stages"),
        ("GPipe", many, ""),
    ]


HEADER = (
    f"{'schedule':16}{'mb':>4} "
    f"{'compiled':9}{'stagecut':>10}{'by hand':>10}{'one GPU':>10}{'bound':>10}{'stagecut/hand':>15}"
)
HEADER += f"{'stagecut/bound':>16}{'hand/bound':>12}   MiB taken, stagecut | by hand"


def run(bench: Bench, minutes: float, out: Path | None) -> int:
    """Runs the benchmark; prints and writes each row as soon as it is there. Returns 1 when losses differ."""
    began, wrong = time.perf_counter(), 0
    single: dict[tuple[int, str], float] = {}
    done: list[dict[str, Any]] = []
    machine = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    if bench.rank == 0:
        print(
            f"{bench.ranks} x {machine}, torch {torch.__version__}, {asdict(bench.size)}\ntokens per "
            f"second\n{HEADER}",
            flush=True,
        )
    for schedule, count, compiled in rows(bench.size):
        spent = time.perf_counter() - began
        if bench.agreed(spent > 60 * minutes or not fits(bench, schedule, count, done)):
            if bench.rank == 0:
                print(
                    f"{schedule:16}{count:>4} {compiled:9} left out after {spent:.0f} s: time or memory",
                    flush=True,
                )
            continue
        names = {"stagecut": bench.ours, "by hand": bench.by_hand}
        variants = {
            name: bench.piped(schedule, count, make, compiled)
            for name, make in names.items()
        }
        if (count, compiled) not in single and compiled != "stages":
            variants["one GPU"] = bench.alone(count, compiled)
        found = bench.measure(variants)
        tokens = count * bench.size.batch * bench.size.length
        speed = {
            name: tokens / median(entry["seconds"]) for name, entry in found.items()
        }
        if "one GPU" in speed:
            single[count, compiled] = speed["one GPU"]
        alone = single[count, compiled if compiled != "stages" else "blocks"]
        bound = bench.ranks * alone * (1 - bubble(schedule, bench.ranks, count))
        pairs = zip(
            found["by hand"]["seconds"], found["stagecut"]["seconds"], strict=True
        )
        row = {
            "schedule": schedule,
            "microbatches": count,
            "compiled": compiled,
            "bound": bound,
            "alone": alone,
            "tokens per second": speed,
        }
        row |= {
            "bound": bound,
            "alone": alone,
            "tokens per second": speed,
            "stagecut/hand": median(hand / ours for hand, ours in pairs),
            "measured": found,
        }
        done.append(row)
        losses = [entry["loss"] for entry in found.values()]
        wrong |= max(losses) - min(losses) > 1e-2 * abs(losses[0])
        if bench.rank == 0:
            print(line(row) + ("   LOSSES DIFFER" if wrong else ""), flush=True)
        if bench.rank == 0 and out is not None:
            out.write_text(
                json.dumps(
                    {
                        "machine": machine,
                        "torch": torch.__version__,
                        "size": asdict(bench.size),
                        "rows": done,
                    },
                    indent=1,
                )
            )
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if bench.rank == 0:
        print(
            f"{time.perf_counter() - began:.0f} s; "
            + ("losses differ" if wrong else "all variants have the same loss"),
            flush=True,
        )
    return int(wrong)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    speed, bound = row["tokens per second"], row["bound"]
    memory = " | ".join(
        " ".join(f"{b / 2**20:.0f}" for b in row["measured"][name]["bytes"])
        for name in ("stagecut", "by hand")
    )
    numbers = (
        f"{speed['stagecut']:>10.0f}{speed['by hand']:>10.0f}{row['alone']:>10.0f}"
        f"{bound:>10.0f}{row['stagecut/hand']:>15.3f}"
    )
    ratios = f"{speed['stagecut'] / bound:>16.3f}{speed['by hand'] / bound:>12.3f}"
    return f"{row['schedule']:16}{row['microbatches']:>4} {row['compiled']:9}{numbers}{ratios}   {memory}"


def fits(bench: Bench, schedule: str, count: int, done: list[dict[str, Any]]) -> bool:
    """False when GPipe, which keeps all micro-batches, would need more memory than there is, judged by the
    memory of fewer micro-batches.
    """
    fewer = [
        row
        for row in done
        if row["schedule"] == schedule == "GPipe" and row["microbatches"] < count
    ]
    if not fewer or bench.device.type != "cuda":
        return True
    taken = (
        max(fewer[-1]["measured"]["stagecut"]["bytes"])
        * count
        / fewer[-1]["microbatches"]
    )
    return (
        torch.cuda.memory_allocated() + taken
        < 0.9 * torch.cuda.get_device_properties(0).total_memory
    )


def main() -> int:
    """Starts a process for each GPU unless torchrun has, then runs the benchmark in each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="start no new row after so many"
    )
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        os.execv(sys.executable, [*launch, __file__, *sys.argv[1:]])
    device = torch.device(
        args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None
    )
    if args.device == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    code = run(Bench(SMALL if args.small else Size(), device), args.minutes, args.out)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
