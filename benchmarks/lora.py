"""LoRA on a Llama of 8 billion parameters in bfloat16 over two GPUs, with sequences so long that training
does not fit on one: from a folder of transformers to an adapter of peft.

torchrun --nproc-per-node 2 benchmarks/lora.py --device cuda
torchrun --nproc-per-node 2 benchmarks/lora.py --small        # a tiny model on CPUs, to try the script

The folder is written once, with random weights: every process draws its part, and `save_pretrained` writes
it. `plain` are as many bytes, written by all processes at once from one buffer, and read by all at once.
Files are on the disk when a time of writing ends, and out of the page cache before one of reading begins.
On one GPU, the unsplit model with the same adapter tries a step of one micro-batch, which is one sequence,
so there is no smaller batch; then one of half the length. After that all GPUs train by 1F1B. Nothing is
checkpointed.

The loss of the first step is that of the unsplit model without gradients, up to rounding. All steps have
the same batch, and losses fall. The script ends with 1 where one of these is not so. Times are those of the
slowest process. `peak` is the most that torch has allocated on a GPU, `predicted` what `pipe.report()` says
for the backward of autograd. The length is 1024 tokens for each 7.4 GiB of the card, unless --length says
otherwise.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import peft
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stagecut import (
    Balanced,
    Driver,
    Pipe,
    Setting,
    checkpoint,
    from_pretrained,
    pipeline,
)
from stagecut.backend.costs.ops import DEVICES
from stagecut.backend.tables import table

T = TypeVar("T")
GIB = 2**30
PIECE = 64 * 2**20
"""Bytes of a plain write."""

EIGHT_BILLION: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOKENS = 256
"""Different tokens in the data, so that there is something to learn in a few steps."""


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    name: str
    number: str
    beside: str = ""


class Bench:
    """One process: its device, its part in what is measured, and what was found."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.figures: list[Figure] = []
        self.wrong: list[str] = []
        self._began = time.perf_counter()
        self.length = options.length or self._length()
        torch.manual_seed(1)
        shape = (options.microbatches, self.length)
        self.tokens = torch.randint(TOKENS, shape).to(device)
        self.config = LlamaConfig(
            **(SMALL if options.small else EIGHT_BILLION), use_cache=False
        )
        self.lora = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )

    def _length(self) -> int:
        if self.device.type != "cuda":
            return 64
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return 1024 * math.ceil(memory / GIB / 7.4)

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """The arguments of the model for one micro-batch, of which sizes count."""
        ids = torch.empty(1, self.length, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "labels": ids}

    def say(self, line: str) -> None:
        """The first process prints the line, with the seconds since the start."""
        if self.rank == 0:
            print(f"[{time.perf_counter() - self._began:6.1f} s] {line}", flush=True)

    def found(self, name: str, number: str, beside: str = "") -> None:
        """The table has one more line."""
        self.figures.append(Figure(name, number, beside))
        self.say(f"{name}: {number}   {beside}")

    def expect(self, fact: bool, otherwise: str) -> None:
        """Where it is no fact on this process, the script ends with 1."""
        if not fact:
            self.wrong.append(otherwise)
            print(f"rank {self.rank}: WRONG: {otherwise}", flush=True)

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """What the work returns, and the seconds of the slowest process."""
        self.wait()
        begin = time.perf_counter()
        result = work()
        self._synchronize()
        seconds = torch.tensor(time.perf_counter() - begin, device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return result, float(seconds)

    def wait(self) -> None:
        """All processes and devices have come here."""
        self._synchronize()
        dist.barrier()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def everywhere(self, item: T) -> list[T]:
        """The items of all processes."""
        items: list[Any] = [None] * self.ranks
        dist.all_gather_object(items, item)
        return items

    def release(self) -> None:
        """What nobody holds any more takes no memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # --- files ------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """`folder` has the base: this process draws and writes its stage."""
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config).to(torch.bfloat16)
        pipe, seconds = self.timed(
            lambda: pipeline(model, (), self.example, stages=self.ranks, check=None)
        )
        self.found("cut on meta", f"{seconds:.1f} s")
        driver = Driver(pipe, "1F1B", self.options.microbatches, device=self.device)
        _, seconds = self.timed(
            lambda: pipe.initialize(driver.stage_indices, device=self.device)
        )
        own = sum(parameter.nbytes for parameter in driver.parameters())
        self.say(f"random weights: {seconds:.1f} s")
        plain = self._plain_write(folder.with_name("plain"), own)
        _, seconds = self.timed(lambda: checkpoint.save_pretrained(driver, folder))
        total = sum(self.everywhere(own))
        ratio = f"{plain / seconds:.2f} of plain"
        self.found("save_pretrained", _speed(total, seconds), ratio)
        if self.rank == 0:
            shutil.rmtree(folder.with_name("plain"))

    def _plain_write(self, folder: Path, nbytes: int) -> float:
        """The seconds in which all processes have written so many bytes each."""
        folder.mkdir(exist_ok=True)
        buffer = memoryview(torch.randint(255, (PIECE,), dtype=torch.uint8).numpy())

        def work() -> None:
            left = nbytes
            with (folder / f"{self.rank}").open("wb", buffering=0) as file:
                while left:
                    left -= file.write(buffer[:left])
                os.fsync(file.fileno())

        _, seconds = self.timed(work)
        total = sum(self.everywhere(nbytes))
        self.found("plain write", _speed(total, seconds))
        return seconds

    def forget(self, folder: Path) -> None:
        """The files are on the disk, and not in the page cache."""
        if self.rank == 0:
            for file in folder.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.wait()

    def plain_read(self, folder: Path) -> float:
        """The seconds in which all processes together have read the files, a part each."""
        files = sorted(folder.glob("*.safetensors"))
        buffer = bytearray(PIECE)

        def work() -> int:
            count = 0
            for file in files[self.rank :: self.ranks]:
                with file.open("rb", buffering=0) as handle:
                    while read := handle.readinto(buffer):
                        count += read
            return count

        count, seconds = self.timed(work)
        total = sum(self.everywhere(count))
        self.found("plain read", _speed(total, seconds))
        return seconds

    def load(self, folder: Path) -> Pipe:
        """The base of the folder with a new adapter, cut; this process has its stage."""
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        cold = not self.options.warm
        if cold:
            self.forget(folder)
        plain = self.plain_read(folder)
        if cold:
            self.forget(folder)
        torch.manual_seed(0)
        pipe, seconds = self.timed(
            lambda: from_pretrained(
                folder,
                (),
                self.example,
                split_policy=Balanced(self.ranks, self.setting, budget=1.0),
                adapter=self.lora,
                device=self.device,
            )
        )
        where = "from the disk" if cold else "from the page cache"
        text = f"{where}, cut with it; plain read {plain:.1f} s"
        self.found("from_pretrained", _speed(nbytes, seconds), text)
        return pipe

    @property
    def setting(self) -> Setting:
        """How the stages run, for predictions."""
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        preset = next((name for name in DEVICES if name in card), "H100")
        count = self.options.microbatches
        return Setting(preset, "1F1B", count, optimizer="adamw")

    # --- one device -------------------------------------------------------------------------------------

    def alone(self, folder: Path) -> float:
        """The loss of the unsplit model on the first process before its first step, known to all. Where its
        training fits on one device, that is wrong.
        """
        loss = [0.0]
        if self.rank == 0:
            loss = [self._alone(folder)]
        self.release()
        dist.broadcast_object_list(loss, device=self.device)
        return loss[0]

    def _alone(self, folder: Path) -> float:
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        base.config.use_cache = False
        model = peft.get_peft_model(base, self.lora).to(self.device)
        self.say("one device has the unsplit model and the adapter")
        with torch.no_grad():
            losses = [
                model(input_ids=tokens, labels=tokens).loss.item()
                for tokens in self.tokens.split(1)
            ]
        for length in (self.length, self.length // 2):
            seconds = self._try(model, length)
            name = f"one device, {length} tokens"
            if seconds is None:
                self.found(name, "out of memory")
            else:
                self.found(name, f"{length / seconds:.0f} tokens/s")
            if self.device.type == "cuda" and length == self.length:
                self.expect(seconds is None, "training fits on one device: --length")
            self.release()
        return sum(losses) / len(losses)

    def _try(self, model: nn.Module, length: int) -> float | None:
        """The seconds of a forward and backward of one micro-batch, None where it takes too much memory."""
        tokens = self.tokens[:1, :length]
        seconds = 0.0
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            try:
                model(input_ids=tokens, labels=tokens).loss.backward()
                self._synchronize()
            except torch.OutOfMemoryError as error:
                held = torch.cuda.max_memory_allocated() / GIB
                self.say(f"{error}".partition("If reserved")[0])
                self.say(f"torch had {held:.1f} GiB by then")
                return None
            seconds = time.perf_counter() - begin
        return seconds

    # --- all devices ------------------------------------------------------------------------------------

    def predict(self, pipe: Pipe) -> None:
        """The table has the bytes that each device will take, and those that one would take for the unsplit
        model and one micro-batch: all that stages hold of one, and the largest that passes.
        """
        each = [stage.memory for stage in pipe.report(self.setting).stages]
        one = replace(self.setting, n_microbatches=1)
        parts = [stage.memory for stage in pipe.report(one).stages]
        whole = max(memory["passing"] for memory in parts)
        for memory in parts:
            whole += sum(memory.values()) - memory["passing"]
        sizes = [sum(memory.values()) for memory in each]
        beside = f"the unsplit model would take {_gib([whole])}"
        self.found("autograd, predicted", _gib(sizes), beside)

    def train(self, pipe: Pipe, backward: str, start: Path, expected: float) -> None:
        """Some steps from the adapter in `start`, with `backward` of Driver."""
        self.release()
        driver = Driver(
            pipe,
            "1F1B",
            self.options.microbatches,
            loss_fn=lambda output: output.loss,
            device=self.device,
            return_outputs=False,
            backward=backward,
        )
        checkpoint.load_adapter(driver, start)
        driver.train()
        trained = [p for p in driver.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([{"params": trained}], self.options.rate)
        losses: list[float] = []
        times: list[float] = []

        def step() -> float:
            optimizer.zero_grad()
            _, found = driver.step(input_ids=self.tokens, labels=self.tokens)
            optimizer.step()
            return float(found.batch or math.nan)

        for number in range(self.options.steps):
            loss, seconds = self.timed(step)
            losses.append(loss)
            times.append(seconds)
            self.say(f"{backward}, step {number}: loss {loss:.4f}, {seconds:.2f} s")
        self._judge(backward, losses, expected)
        speed = self.tokens.numel() / median(times[1:])
        shown = f"{losses[0]:.4f} to {losses[-1]:.4f}"
        note = f"; {'; '.join(driver.notes)}" if driver.notes else ""
        self.found(
            f"{backward}, {self.ranks} devices",
            f"{speed:.0f} tokens/s",
            f"first step {times[0]:.1f} s, loss {shown}{note}",
        )
        if self.device.type == "cuda":
            peaks = self.everywhere(torch.cuda.max_memory_allocated())
            self.found(f"{backward}, peak", _gib(peaks))
        optimizer.zero_grad()

    def _judge(self, backward: str, losses: list[float], expected: float) -> None:
        near = abs(losses[0] - expected) <= 2.0**-7 * abs(expected)
        self.expect(near, f"{backward}: {losses[0]} is not the loss {expected}")
        self.expect(losses[-1] < losses[0], f"{backward}: losses do not fall: {losses}")

    def adapter(self, pipe: Pipe, folder: Path) -> None:
        """The adapter goes to `folder` and comes back, bit for bit."""
        driver = Driver(pipe, "1F1B", self.options.microbatches, device=self.device)
        trained = [p for p in driver.parameters() if p.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        _, seconds = self.timed(lambda: checkpoint.save_adapter(driver, folder))
        size = (folder / "adapter_model.safetensors").stat().st_size / 2**20
        self.found("save_adapter", f"{seconds:.2f} s", f"{size:.1f} MiB")
        with torch.no_grad():
            for parameter in trained:
                parameter.fill_(7.0)
        _, seconds = self.timed(lambda: checkpoint.load_adapter(driver, folder))
        pairs = zip(trained, before, strict=True)
        self.expect(all(torch.equal(*pair) for pair in pairs), "other bits came back")
        self.found("load_adapter", f"{seconds:.2f} s", "the same bits")


def _speed(nbytes: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {nbytes / 1e9 / seconds:.2f} GB/s"


def _gib(sizes: list[int]) -> str:
    return " and ".join(f"{size / GIB:.2f}" for size in sizes) + " GiB"


def run(bench: Bench, place: Path) -> None:
    """All parts, in the order of somebody who has a folder and wants an adapter."""
    base = place / "base"
    bench.write(base)
    bench.release()
    expected = bench.alone(base)
    pipe = bench.load(base)
    bench.predict(pipe)
    bench.adapter(pipe, place / "new")
    for backward in bench.options.backwards:
        bench.train(pipe, backward, place / "new", expected)
    bench.adapter(pipe, place / "tuned")


def main() -> int:
    """Runs it all and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument(
        "--backwards",
        nargs="+",
        choices=["autograd", "graph"],
        default=["autograd"],
        help="whose backward",
    )
    parser.add_argument("--warm", action="store_true", help="read from the page cache")
    parser.add_argument("--folder", help="where files go; a temporary one by default")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    index = int(os.environ["LOCAL_RANK"]) if cuda else None
    device = torch.device(options.device, index)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    bench = Bench(options, device)
    card = torch.cuda.get_device_name() if cuda else "CPU"
    bench.say(
        f"{bench.ranks} x {card}, torch {torch.__version__}, {bench.length} tokens a "
        f"sequence, {options.microbatches} sequences a step"
    )
    places = [tempfile.mkdtemp(dir=options.folder) if bench.rank == 0 else ""]
    dist.broadcast_object_list(places, device=device)
    try:
        run(bench, Path(places[0]))
    finally:
        if bench.rank == 0:
            shutil.rmtree(places[0])
    wrong = any(bench.everywhere(bool(bench.wrong)))
    if bench.rank == 0:
        rows = [(each.name, each.number, each.beside) for each in bench.figures]
        print(table([("", "", ""), *rows], left=(0, 1, 2)), flush=True)
    dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
