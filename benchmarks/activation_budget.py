"""What a stage saves for its backward by graphs under some budgets, and what it computes again for that.

python benchmarks/activation_budget.py                   # a stage of four blocks of a Llama of transformers
python benchmarks/activation_budget.py --micro-batches 8 --width 512

It is the middle stage of three under 1F1B, traced on the CPU; nothing runs. Bytes are those of all
micro-batches in flight. FLOPs that are computed again are given in parts of those of the forward.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stagecut import Pipe, SplitPoint, pipeline
from stagecut.backend.schedules import flights_of
from stagecut.backend.stages.memory import traced_stage
from stagecut.backend.tables import table
from stagecut.ir.graph import Op
from stagecut.ir.ops import is_heavy
from stagecut.ir.roles import Budget, Roles
from stagecut.ir.run.flops import flops_of
from stagecut.ir.text.printer import size_text

BLOCKS = 12


def cut(width: int, length: int) -> Pipe:
    """A Llama in three stages."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    tokens = torch.zeros(2, length, dtype=torch.long)
    cuts = {f"model.layers.{at}": SplitPoint.BEGINNING for at in (4, 8)}
    return pipeline(LlamaForCausalLM(config), (tokens,), split_spec=cuts, check=None)


def again(roles: Roles) -> list[Op]:
    """The ops that the backward computes again, views aside."""
    backward = [*roles.backward_input.ops, *roles.backward_weight.ops]
    return [op for op in backward if op.origin is not None and not op.is_view]


def row(way: str, roles: Roles, nbytes: int) -> tuple[str, str, str, str]:
    """A line of the table."""
    ops = again(roles)
    forward = sum(map(flops_of, roles.forward.ops))
    light = sum(not is_heavy(op) for op in ops)
    share = sum(map(flops_of, ops)) / forward
    return way, size_text(nbytes), str(light), f"{share:.2f}"


def main() -> None:
    """A line for each budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    pipe = cut(arguments.width, arguments.length)
    flight = flights_of("1F1B", 3, 3, arguments.micro_batches)[1]
    traced = traced_stage(pipe, 1, {})
    ways: list[tuple[str, bool | Budget]] = [("none", False)]
    ways += [(str(part), Budget(part, flight)) for part in (0.75, 0.5)]
    ways += [("recompute=True", True)]
    ways += [(str(part), Budget(part, flight)) for part in (0.25, 0.1, 0.0)]
    rows = [("activation_budget", "saved", "light ops again", "FLOPs again")]
    for name, recompute in ways:
        roles, _ = traced.roles(recompute)
        rows.append(row(name, roles, roles.memory.during(flight)))
    print(table(rows, left=(0,)))


if __name__ == "__main__":
    main()
