"""Predicted stage times and memory beside measured ones, and the automatic cut beside every cut between
blocks.

python benchmarks/predictions.py --device cpu            # stage times of three models on this machine's CPU
python benchmarks/predictions.py --device cuda           # the same on a GPU, and memory
torchrun --nproc-per-node 2 benchmarks/predictions.py --device cuda --cuts --preset H200
                                                         # 1F1B over 2 GPUs, every cut between blocks and the
                                                         # automatic one

Times are compared as shares of the whole, since a share is what decides a cut. `ranks` is Spearman's
correlation over all stages. The model of the second part is that of gpu_pipeline.py, with its loss inside, so
that the search sees what the loss costs.
"""

import argparse
import os
import sys
import time
from statistics import mean, median

import torch
import torch.distributed as dist
from gpu_pipeline import SMALL, Llama, Size, loss_of
from torch import nn

from stagecut import Balanced, Driver, Pipe, Setting, SplitPoint, pipeline

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model = Llama(size)

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model(tokens), target)


class Wide(nn.Module):
    """Convolutions whose images get smaller and whose channels get more, as in a ResNet."""

    def __init__(self, base: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, base, 3, padding=1)]
        for level in range(4):
            width = base * 2**level
            for _ in range(3):
                layers += [
                    nn.Conv2d(width, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
            layers += [
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean()


class Encoder(nn.Module):
    """A transformer encoder with a large embedding and a small head."""

    def __init__(self, width: int, depth: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.ups, self.downs = (
            nn.ModuleList(nn.Linear(a, b) for _ in range(depth))
            for a, b in ((width, 4 * width), (4 * width, width))
        )
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for norm, up, down, mix in zip(
            self.norms, self.ups, self.downs, self.mix, strict=True
        ):
            y = norm(x)
            x = x + torch.softmax(y @ y.transpose(1, 2) / y.shape[-1] ** 0.5, -1) @ mix(
                y
            )
            x = x + down(nn.functional.gelu(up(x)))
        return self.head(x).square().mean()


def models(device: torch.device) -> dict[str, Made]:
    """Three models with an example each, small on a CPU."""
    big = device.type == "cuda"
    torch.manual_seed(0)
    size = Size(blocks=8) if big else Size(6, 256, 4, 704, 8000, 256, 2)
    dtype = torch.bfloat16 if big else torch.float32
    with device:
        llama = WithLoss(size).to(dtype)
        tokens = torch.randint(size.vocabulary, (size.batch, size.length))
        wide = Wide(64 if big else 16).to(dtype)
        images = torch.randn((16, 3, 256, 256) if big else (4, 3, 96, 96), dtype=dtype)
        encoder = Encoder(*((2048, 12, 50_000) if big else (192, 8, 20_000))).to(dtype)
        ids = torch.randint(20_000, (4, 1024) if big else (4, 192))
    return {
        "Llama-like": (llama, (tokens, tokens)),
        "convolutions": (wide, (images,)),
        "encoder": (encoder, (ids,)),
    }


def measured(
    pipe: Pipe, args: tuple[torch.Tensor, ...], device: torch.device, repeats: int = 7
) -> tuple[list[float], list[int]]:
    """Per stage: median seconds of forward and backward, and bytes that it keeps between them."""
    times: list[list[float]] = [[] for _ in pipe.stages]
    kept = [0] * len(pipe.stages)
    for _ in range(repeats):
        values = dict(zip(pipe.program.inputs, args, strict=True))
        for stage, block in zip(pipe.stages, pipe.program.stages, strict=True):
            held = _held(device)
            given = [_received(values[v]) for v in block.inputs]
            begin = _now(device)
            result = stage(*given)
            results = result if isinstance(result, tuple) else (result,)
            flowing = [
                r for r in results if isinstance(r, torch.Tensor) and r.requires_grad
            ]
            middle = _now(device)
            kept[block.index] = _held(device) - held
            grads = [torch.ones_like(r) for r in flowing]
            start = _now(device)
            torch.autograd.backward(flowing, grads)
            times[block.index].append(middle - begin + _now(device) - start)
            stage.zero_grad()
            values |= zip(block.outputs, map(_received, results), strict=True)
            # the next stage's bytes are counted from here
            del (
                given,
                result,
                results,
                flowing,
                grads,
            )
    return [median(t[2:]) for t in times], kept


def _received(item: object) -> object:
    return (
        item.detach().clone().requires_grad_(item.requires_grad)
        if isinstance(item, torch.Tensor)
        else item
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _ranks(numbers: list[float]) -> list[int]:
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    return [order.index(i) for i in range(len(numbers))]


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of two orders; 1 for equal ones."""
    a, b, n = _ranks(one), _ranks(other), len(one)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (
        n * (n * n - 1)
    )


def stage_times(device: torch.device, preset: str) -> None:
    """Prints the shares of four equal runs of ops, measured and predicted."""
    setting = Setting(preset, "GPipe", 1, optimizer="none")
    print(
        f"{'model':14}{'stage':>6}{'measured':>11}{'timed ops':>11}{'roofline':>11}   MiB kept, measured | "
        "predicted"
    )
    everything: dict[str, list[float]] = {"measured": [], "timed": [], "roofline": []}
    for name, (model, args) in models(device).items():
        pipe = pipeline(
            model,
            args,
            split_policy=lambda program: [len(program.ops) * i // 4 for i in (1, 2, 3)],
            check=None,
        )
        seconds, kept = measured(pipe, args, device)
        reports = {
            "timed": pipe.report(setting, profile_on=str(device)),
            "roofline": pipe.report(setting),
        }
        shares = {"measured": [s / sum(seconds) for s in seconds]} | {
            how: [s.share for s in r.stages] for how, r in reports.items()
        }
        for i in range(pipe.num_stages):
            predicted = reports["roofline"].stages[i].memory["activations"]
            memory = (
                f"{kept[i] / 2**20:>10.1f} | {predicted / 2**20:.1f}"
                if device.type == "cuda"
                else ""
            )
            row = "".join(f"{shares[how][i]:>11.3f}" for how in everything)
            print(f"{name:14}{i:>6}{row}   {memory}", flush=True)
        for how, numbers in shares.items():
            everything[how] += numbers
    for how in ("timed", "roofline"):
        errors = [
            abs(p / m - 1)
            for p, m in zip(everything[how], everything["measured"], strict=True)
        ]
        order = spearman(everything["measured"], everything[how])
        print(
            f"{how}: ranks {order:.3f}, mean error {mean(errors):.3f}, largest {max(errors):.3f}"
        )


def compare_cuts(
    device: torch.device, preset: str, small: bool, schedule: str = "1F1B"
) -> None:
    """Prints tokens per second of every cut between blocks and of the automatic one, and the predictions."""
    size = SMALL if small else Size()
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    with device:
        model = WithLoss(size).to(
            torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        tokens = torch.randint(
            size.vocabulary, (size.batch * size.microbatches[0], size.length)
        )
    count = size.microbatches[0]
    args = (tokens[: size.batch], tokens[: size.batch])
    setting = Setting(preset, schedule, count, optimizer="adamw")
    middle = size.blocks // 2
    places = {
        i: {"split_spec": {f"model.blocks.{i}": SplitPoint.BEGINNING}}
        for i in range(middle - 2, middle + 4)
    }
    ways = {f"in front of block {i}": way for i, way in places.items()}
    ways["automatic, roofline"] = {"split_policy": Balanced(ranks, setting)}
    ways["automatic, timed ops"] = {
        "split_policy": Balanced(ranks, setting, profile_on=str(device))
    }
    drivers, predicted, memory = {}, {}, {}
    for name, way in ways.items():
        torch.manual_seed(0)
        # timed ops differ between processes
        pipe = _alike(lambda way=way: pipeline(model, args, check=None, **way), rank)
        report = pipe.report(setting)
        predicted[name] = max(s.forward + s.backward for s in report.stages)
        memory[name] = [
            s.memory["activations"] + s.memory["gradients"] + s.memory["passing"]
            for s in report.stages
        ]
        drivers[name] = Driver(
            pipe,
            schedule,
            count,
            loss_fn=lambda out: out,
            device=device,
            return_outputs=False,
        )
    alone, speeds, taken = [], {name: [] for name in drivers}, {}
    for repeat in range(size.warm_up + size.repeats):
        for name in list(drivers)[:: -1 if repeat % 2 else 1]:
            seconds, peak = _step(
                lambda name=name: drivers[name].step(tokens, tokens), model, device
            )
            speeds[name].append(seconds)
            taken[name] = peak
        alone.append(
            _step(
                lambda: (
                    rank == 0
                    and [
                        (model(t, t) / count).backward()
                        for t in tokens.split(size.batch)
                    ]
                ),
                model,
                device,
            )[0]
        )
    total = tokens.numel()
    single = total / median(alone[size.warm_up :])
    bound = ranks * single * count / (count + ranks - 1)
    if rank == 0:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(
            f"{ranks} x {machine}, torch {torch.__version__}, {schedule}, {count} micro-batches"
        )
        print(f"one GPU {single:.0f} tokens/s, bound {bound:.0f}")
        print(
            f"{'cut':24}{'tokens/s':>10}{'of bound':>10}{'predicted slowest':>19}   GiB taken, measured | "
            "predicted"
        )
        for name, seconds in speeds.items():
            speed = total / median(seconds[size.warm_up :])
            sizes = (
                " ".join(f"{b / 2**30:.2f}" for b in taken[name])
                + " | "
                + " ".join(f"{b / 2**30:.2f}" for b in memory[name])
            )
            print(
                f"{name:24}{speed:>10.0f}{speed / bound:>10.3f}{1e3 * predicted[name]:>16.2f} ms   {sizes}"
            )


def _alike(make, rank: int) -> Pipe:
    """The pipe of the first process, made by all processes, because the cuts of the first one count."""
    pipe = make()
    positions = [[*pipe.plan.cuts] if pipe.plan else None]
    dist.broadcast_object_list(positions)
    if positions[0] is None or rank == 0:
        return pipe
    model = pipe._model()
    return pipeline(
        model, _example(pipe), split_policy=lambda program: positions[0], check=None
    )


def _example(pipe: Pipe) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.zeros(v.type.shape, dtype=torch.long, device=v.type.device)
        for v in pipe.program.inputs
    )


def _step(run, model: nn.Module, device: torch.device) -> tuple[float, list[int]]:
    """Seconds of the slowest process, and the bytes that each took beyond those it held."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held, begin = _held(device), _now(device)
    run()
    seconds = _now(device) - begin
    peak = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0
    model.zero_grad()
    everywhere: list[tuple[float, int]] = [(0.0, 0)] * dist.get_world_size()
    dist.all_gather_object(everywhere, (seconds, peak))
    return max(s for s, _ in everywhere), [p for _, p in everywhere]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument(
        "--preset", help="the device of the roofline; CPU or H100 when not given"
    )
    parser.add_argument(
        "--cuts",
        action="store_true",
        help="compare cuts over the processes that torchrun starts",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model for --cuts")
    args = parser.parse_args()
    preset = args.preset or ("CPU" if args.device == "cpu" else "H100")
    if not args.cuts:
        stage_times(torch.device(args.device), preset)
        return 0
    device = torch.device(
        args.device, int(os.environ["LOCAL_RANK"]) if args.device == "cuda" else None
    )
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    compare_cuts(device, preset, args.small)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
