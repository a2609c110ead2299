"""Inference by accelerate's `prepare_pippy`, with the stages of stagecut in the place of torch's.

torchrun --nproc-per-node 2 examples/accelerate_pippy.py

On GPUs where there are any, else on CPUs.
"""

import sys

import accelerate.inference
import torch
import torch.distributed as dist
import torch.distributed.pipelining
from accelerate import PartialState, prepare_pippy
from trainer_hf import make_model

import stagecut


def to_all(output):
    """The output of the last rank. accelerate 1.15 hands torch.zeros a tensor for a size here."""
    outputs = [output]
    dist.broadcast_object_list(outputs, src=dist.get_world_size() - 1)
    return outputs[0]


torch.distributed.pipelining.pipeline = stagecut.pipeline  # accelerate asks there
accelerate.inference.copy_tensor_to_devices = to_all


def main() -> None:
    state = PartialState(cpu=not torch.cuda.is_available())
    ranks = state.num_processes
    model = make_model().eval()
    tokens = torch.arange(16 * ranks).view(ranks, 16) % 64
    expected = model(tokens).logits

    model = prepare_pippy(
        model,
        split_points=[f"model.layers.{4 * i // ranks}" for i in range(1, ranks)],
        example_args=(tokens[:1],),  # one micro-batch
        gather_output=True,
    )
    with torch.no_grad():
        logits = model(tokens.to(state.device))

    difference = (logits.cpu() - expected).abs().max().item()
    shape = [*logits.shape]
    # one write a line: the ranks share the terminal
    sys.stdout.write(
        f"rank {state.process_index}: {shape}, difference {difference:.0e}\n"
    )
    state.destroy_process_group()


if __name__ == "__main__":
    main()
