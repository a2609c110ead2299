"""Trains a small GPT on the compiler's own source, one stage on each process that torchrun starts.

torchrun --nproc-per-node 4 examples/train_gpt.py --schedule 1f1b
torchrun --nproc-per-node 2 examples/train_gpt.py --schedule Interleaved1F1B --stages 4 --compare

On GPUs where there are any, else on CPUs.
"""

import argparse
import os
from copy import deepcopy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

import stagecut
from stagecut import Driver, SplitPoint, pipeline

WIDTH, DEPTH, HEADS, LENGTH = 64, 8, 4, 64
MICRO_BATCH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self.qkv(self.attention_norm(x))
            .unflatten(-1, (3, HEADS, -1))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A byte-level language model; its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def read_text() -> torch.Tensor:
    """The bytes of stagecut's own source."""
    files = sorted(Path(stagecut.__file__).parent.glob("ir/*.py"))
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def join() -> torch.device:
    """The device of this process, which has joined the others."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--schedule", default="1F1B", help="a schedule of torch.distributed.pipelining"
    )
    parser.add_argument(
        "--stages", type=int, help="how many; one a process unless told"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="check every loss against training in one process",
    )
    args = parser.parse_args()

    device = join()
    torch.manual_seed(args.seed)  # the same model and the same batches on every process
    model, text = GPT(), read_text()
    single = deepcopy(model).to(device)

    stages = args.stages or dist.get_world_size()
    cuts = {
        f"blocks.{DEPTH * i // stages}": SplitPoint.BEGINNING for i in range(1, stages)
    }
    pipe = pipeline(
        model, (torch.zeros(MICRO_BATCH, LENGTH, dtype=torch.long),), split_spec=cuts
    )
    driver = Driver(pipe, args.schedule, args.microbatches, loss_of, device=device)
    optimizer = torch.optim.AdamW(driver.parameters(), 3e-3)
    driver.attach(
        optimizer
    )  # the embedding and the head are one parameter on two processes
    single_optimizer = torch.optim.AdamW(single.parameters(), 3e-3)

    with Progress(disable=not driver.is_last) as bar:
        task = bar.add_task("", total=args.steps)
        for step in range(args.steps):
            start = torch.randint(
                len(text) - LENGTH, (MICRO_BATCH * args.microbatches, 1)
            )
            batch = text[start + torch.arange(LENGTH + 1)].to(device)
            _, losses = driver.step(batch[:, :-1], target=batch[:, 1:])
            optimizer.step()
            optimizer.zero_grad()
            if not driver.is_last:
                continue
            loss = torch.stack(losses).mean().item()
            bar.update(task, advance=1, description=f"loss {loss:.4f}")
            if args.compare:
                expected = loss_of(single(batch[:, :-1]), batch[:, 1:])
                expected.backward()
                single_optimizer.step()
                single_optimizer.zero_grad()
                if abs(loss - expected.item()) > 1e-3:
                    raise SystemExit(
                        f"step {step}: loss {loss} in stages, {expected.item()} in one process"
                    )
    if driver.is_last:
        print(
            f"loss {loss:.4f} after {args.steps} steps"
            + ", as in one process" * args.compare
        )
    dist.barrier()  # torch may abort in a process that leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
