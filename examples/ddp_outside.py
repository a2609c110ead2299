"""Trains a small GPT in two pipelines of two stages, with DistributedDataParallel around each stage.

torchrun --nproc-per-node 4 examples/ddp_outside.py

A plain loop: each pipeline has batches of its own, and DDP averages the gradients of a stage over the
pipelines. On GPUs where there are any, else on CPUs.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from train_gpt import DEPTH, GPT, LENGTH, join, loss_of

from stagecut import Driver, SplitPoint, pipeline


def batch(step: int, replica: int) -> torch.Tensor:
    """Bytes that count, another batch for each pipeline."""
    start = torch.arange(8).view(-1, 1) + 50 * step + 100 * replica
    return (start + 3 * torch.arange(LENGTH + 1)) % 256


def main() -> None:
    device = join()
    torch.manual_seed(0)  # the same model on every process
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "pipe")
    )
    replicas = mesh["data"].get_group()

    pipe = pipeline(
        GPT(),
        (torch.zeros(2, LENGTH, dtype=torch.long),),
        split_spec={f"blocks.{DEPTH // 2}": SplitPoint.BEGINNING},
    )
    driver = Driver(
        pipe,
        "1F1B",
        4,
        loss_of,
        group=mesh.get_group("pipe"),
        device=device,
        wrap=lambda stage, _: DistributedDataParallel(stage, process_group=replicas),
    )
    optimizer = torch.optim.AdamW(driver.parameters(), 3e-3)
    driver.attach(optimizer)  # the embedding and the head are one parameter

    for step in range(3):
        tokens = batch(step, mesh["data"].get_local_rank()).to(device)
        _, losses = driver.step(tokens[:, :-1], target=tokens[:, 1:])
        driver.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = losses.batch / mesh["data"].size()
        dist.all_reduce(loss, group=replicas)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.barrier()  # torch may abort in a process that leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
