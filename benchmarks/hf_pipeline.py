"""Unmodified Hugging Face models over two GPUs: stagecut's pipeline and Driver beside the same modules cut by
hand, at the same place.

python benchmarks/hf_pipeline.py                          # on 2 GPUs; torchrun starts it, or it starts itself
python benchmarks/hf_pipeline.py --device cpu --small     # tiny models, to try the script
python benchmarks/hf_pipeline.py --models llama --kernels # one model, and the kernels of the whole model on
                                                          # one GPU

A step is forward and backward of all micro-batches, the sum of tied gradients, and AdamW with a learning rate
of zero, so that both ways keep the same weights and must have the same loss; the script ends with 1 where
they do not. By hand, a stage is an nn.Module around the model's own layers, called as the model calls them,
under torch's manual `PipelineStage`; the tied embedding's gradients are added up by an all-reduce. The two
alternate, a time is that of the slower process, and `ratio` is the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from stagecut import Driver, SplitPoint, pipeline

Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """A model, where it is cut, and the size of a micro-batch."""

    name: str
    make: Callable[[], nn.Module]
    layers: str
    cut: int
    batch: int
    length: int


class DecoderPart(nn.Module):
    """Some layers of a Llama or of a model built like one, as one cuts by hand."""

    def __init__(self, model: Any, start: int, stop: int) -> None:
        super().__init__()
        self.first, self.last = start == 0, stop == len(model.model.layers)
        self.embedding = model.model.embed_tokens if self.first else None
        self.rotary = model.model.rotary_emb
        self.layers = model.model.layers[start:stop]
        self.norm, self.head = (
            (model.model.norm, model.lm_head) if self.last else (None, None)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        rotation = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotation,
            )
        return (
            self.head(self.norm(x))
            if self.norm is not None and self.head is not None
            else x
        )

    def tied(self) -> torch.Tensor:
        owner = self.embedding if self.embedding is not None else self.head
        return owner.weight  # type: ignore[union-attr,return-value]


class GPT2Part(nn.Module):
    """Some layers of a GPT-2, as one cuts by hand."""

    def __init__(self, model: Any, start: int, stop: int) -> None:
        super().__init__()
        body = model.transformer
        self.first, self.last = start == 0, stop == len(body.h)
        self.tokens, self.positions, self.drop = (
            (body.wte, body.wpe, body.drop) if self.first else (None, None, None)
        )
        self.layers = body.h[start:stop]
        self.norm, self.head = (body.ln_f, model.lm_head) if self.last else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            self.tokens is not None
            and self.positions is not None
            and self.drop is not None
        ):
            x = self.drop(
                self.tokens(x)
                + self.positions(torch.arange(x.shape[1], device=x.device).unsqueeze(0))
            )
        for layer in self.layers:
            x = layer(x, attention_mask=None)
        return (
            self.head(self.norm(x))
            if self.norm is not None and self.head is not None
            else x
        )

    def tied(self) -> torch.Tensor:
        owner = self.tokens if self.tokens is not None else self.head
        return owner.weight  # type: ignore[union-attr,return-value]


def _llama(small: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = (
        _tiny()
        if small
        else {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "vocab_size": 128_256,
        }
    )
    heads = (
        {"num_attention_heads": 4, "num_key_value_heads": 2}
        if small
        else {"num_attention_heads": 32, "num_key_value_heads": 8}
    )
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    return LlamaForCausalLM(
        LlamaConfig(
            **size,
            **heads,
            tie_word_embeddings=True,
            rope_parameters=rope,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _qwen3(small: bool) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = (
        _tiny()
        if small
        else {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "vocab_size": 151_936,
        }
    )
    heads = (
        {"num_attention_heads": 4, "num_key_value_heads": 2}
        if small
        else {"num_attention_heads": 16, "num_key_value_heads": 8}
    )
    return Qwen3ForCausalLM(
        Qwen3Config(
            **size, **heads, head_dim=16 if small else 128, tie_word_embeddings=True
        )
    )


def _gpt2(small: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # it warns of a loss that is the default
    size = (
        {"n_embd": 64, "n_layer": 4, "n_head": 4}
        if small
        else {"n_embd": 1280, "n_layer": 36, "n_head": 20}
    )
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    words = (
        {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
        if small
        else {"vocab_size": 50_257}
    )
    return GPT2LMHeadModel(GPT2Config(**size, **drops, **words))


def _tiny() -> dict[str, int]:
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "vocab_size": 128,
    }


def cases(small: bool) -> dict[str, Case]:
    """The models by name."""
    length = 16 if small else 2048
    return {
        "llama": Case(
            "Llama 3.2-1B's shape",
            lambda: _llama(small),
            "model.layers",
            2 if small else 10,
            2,
            length,
        ),
        "qwen3": Case(
            "Qwen3-0.6B's shape",
            lambda: _qwen3(small),
            "model.layers",
            2 if small else 18,
            2,
            length,
        ),
        "gpt2": Case(
            "GPT-2 large's shape",
            lambda: _gpt2(small),
            "transformer.h",
            2 if small else 20,
            4,
            min(length, 1024),
        ),
    }


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


class ByHand(PipelineStage):
    """torch 2.11 refuses the outputs of a compiled stage where its compiler pads rows: 50,257 words become
    50,264.
    """

    def _validate_fwd_outputs(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """Returns."""


class Bench:
    """One model on one process, and the steps that can be timed."""

    def __init__(
        self, case: Case, device: torch.device, microbatches: int, schedule: str
    ) -> None:
        self.case = case
        self.device = device
        self.microbatches = microbatches
        self.schedule = schedule
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            self.model = case.make().to(dtype).train()
            shape = (case.batch * microbatches, case.length)
            words = self.model.get_input_embeddings().weight.shape[0]
            self.tokens = torch.randint(words, shape)
            self.target = torch.randint(words, shape)
        began = time.perf_counter()
        inputs = {"input_ids": self.tokens[: case.batch], "use_cache": False}
        spec = {f"{case.layers}.{case.cut}": SplitPoint.BEGINNING}
        self.pipe = pipeline(self.model, mb_kwargs=inputs, split_spec=spec, check=None)
        self.cut_in = time.perf_counter() - began

    def ours(self, compiled: bool) -> Step:
        """A step of a Driver."""
        driver = Driver(
            self.pipe,
            self.schedule,
            self.microbatches,
            lambda output, target: loss_of(output.logits, target),
            return_outputs=False,
        )
        for module in driver.modules.values() if compiled else ():
            module.compile()
        optimizer = torch.optim.AdamW(driver.parameters(), lr=0.0, fused=True)
        driver.attach(optimizer)

        def step() -> float:
            _, losses = driver.step(
                input_ids=self.tokens, use_cache=False, target=self.target
            )
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack(losses).mean().item() if losses else float("nan")

        return step

    def by_hand(self, compiled: bool) -> Step:
        """The same with modules of the model and torch's schedule."""
        rank = dist.get_rank()
        kind = GPT2Part if self.case.layers == "transformer.h" else DecoderPart
        layers = self.model.get_submodule(self.case.layers)
        part = kind(
            self.model,
            *((0, self.case.cut) if rank == 0 else (self.case.cut, len(layers))),
        )  # type: ignore[arg-type]
        tied = part.tied()
        optimizer = torch.optim.AdamW(part.parameters(), lr=0.0, fused=True)
        if compiled:
            part.compile()
        schedule = get_schedule_class(self.schedule)(
            ByHand(part, rank, 2, self.device), self.microbatches, loss_fn=loss_of
        )

        def step() -> float:
            losses: list[torch.Tensor] = []
            if rank == 0:
                schedule.step(self.tokens)
            else:
                schedule.step(target=self.target, losses=losses, return_outputs=False)
            dist.all_reduce(tied.grad)
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack(losses).mean().item() if losses else float("nan")

        return step

    def timed(self, step: Step) -> tuple[float, float]:
        """Seconds of the slower process, and the loss."""
        self._wait()
        start = time.perf_counter()
        loss = step()
        self._wait()
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (time.perf_counter() - start, loss))
        return max(seconds for seconds, _ in everywhere), next(
            loss for _, loss in everywhere if not math.isnan(loss)
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def row(bench: Bench, compiled: bool, warm_up: int, repeats: int) -> bool:
    """Prints one row; True where both have the same loss."""
    steps = {"stagecut": bench.ours(compiled), "by hand": bench.by_hand(compiled)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for repeat in range(warm_up + repeats):
        for name in list(steps)[:: -1 if repeat % 2 else 1]:
            taken, losses[name] = bench.timed(steps[name])
            if repeat >= warm_up:
                seconds[name].append(taken)
    same = abs(losses["stagecut"] - losses["by hand"]) <= 1e-2 * abs(losses["by hand"])
    if dist.get_rank() == 0:
        tokens = bench.tokens.numel()
        speed = {name: tokens / median(values) for name, values in seconds.items()}
        ratios = sorted(
            hand / ours
            for hand, ours in zip(seconds["by hand"], seconds["stagecut"], strict=True)
        )
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(
            f"{bench.case.name:22}{'compiled' if compiled else 'eager':10}"
            f"{speed['stagecut']:>10.0f}{speed['by hand']:>10.0f}"
            f"{median(ratios):>8.3f}  "
            f"{spread:16}{losses['stagecut']:>9.4f}{'' if same else '  LOSSES DIFFER'}",
            flush=True,
        )
    return same


def kernels(bench: Bench) -> None:
    """Prints the time and the kernels of forward and backward of the whole model on one GPU, eager and as the
    pipe.
    """
    given = {"input_ids": bench.tokens[: bench.case.batch], "use_cache": False}
    target = bench.target[: bench.case.batch]
    runs: dict[str, Any] = {"eager": bench.model, "pipe": bench.pipe.module()}
    counts: dict[str, dict[str, int]] = {}
    for name, module in [*runs.items(), *runs.items()]:
        counts[name], seconds = _profiled(
            lambda module=module: loss_of(module(**given).logits, target).backward()
        )
        bench.model.zero_grad()
        print(
            f"{bench.case.name:22}one GPU, {name:6} {1000 * seconds:8.1f} ms {sum(counts[name].values()):6} "
            "kernels",
            flush=True,
        )
    for kernel in sorted(counts["eager"] | counts["pipe"]):
        pair = [counts[name].get(kernel, 0) for name in runs]
        if pair[0] != pair[1]:
            print(f"    {pair[0]:5} {pair[1]:5}  {kernel[:120]}", flush=True)


def _profiled(run: Callable[[], Any]) -> tuple[dict[str, int], float]:
    """Kernel -> how often one run starts it; seconds of a run, the median of seven."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        run()
        torch.cuda.synchronize()
    counts: dict[str, int] = {}
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts, median(times[2:])


def main() -> int:
    """Starts a process for each GPU unless torchrun has, then runs the benchmark in each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["llama", "qwen3", "gpt2"],
        choices=["llama", "qwen3", "gpt2"],
    )
    parser.add_argument(
        "--schedule", default="1F1B", help="one stage a rank: 1F1B or GPipe"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--eager", action="store_true", help="leave compiled stages out"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="count the kernels of the whole model on the first GPU too",
    )
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
    same = [
        model_rows(case, device, args)
        for name, case in cases(args.small).items()
        if name in args.models
    ]
    dist.destroy_process_group()
    return 0 if all(same) else 1


def model_rows(case: Case, device: torch.device, args: argparse.Namespace) -> bool:
    """Prints the rows of one model; True where all losses agree."""
    bench = Bench(case, device, args.microbatches, args.schedule)
    if dist.get_rank() == 0:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        import transformers

        count = sum(p.numel() for p in bench.model.parameters())
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(
            f"\n2 x {machine}, {versions}, {args.schedule}, {args.microbatches} micro-batches"
        )
        print(
            f"{case.batch} x {case.length} tokens, {count / 1e9:.2f} B parameters, cut in "
            f"{bench.cut_in:.1f} s"
        )
        print("\n".join(f"note: {note}" for note in bench.pipe.notes))
        print(
            f"{'tokens/s':32}{'stagecut':>10}{'by hand':>10}{'ratio':>8}  {'ratios':16}{'loss':>9}",
            flush=True,
        )
        if args.kernels and device.type == "cuda":
            kernels(bench)
    dist.barrier()
    same = [
        row(bench, compiled, 3, args.repeats)
        for compiled in ((False,) if args.eager else (False, True))
    ]
    return all(same)


if __name__ == "__main__":
    sys.exit(main())
