"""place-lanes: state of the caller's objects lists the stages that touch it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from helpers import Bless, diff_of, leaves_alone, load

from stagecut import SplitPoint, parse, pipeline, text
from stagecut.passes.place_lanes import PlaceLanes


def test_lanes_of_one_stage_of_several_and_of_none(bless: Bless) -> None:
    bless("place-lanes.diff", diff_of(PlaceLanes(), load("lanes")))


def test_without_lanes_nothing_to_do() -> None:
    leaves_alone(PlaceLanes(), load("linked"))


def test_a_program_that_is_not_linked_stays() -> None:
    lines = "program @P phase=traced {\n  input %x : f32[2]\n  lane %x  # 8 B\n  output (%x,)\n}\n"
    program = parse(lines)
    leaves_alone(PlaceLanes(), program)
    assert text(program) == lines


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_tensor_of_a_cache_crosses(kind: str) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=4, **size)).eval()
    cache: Any = transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=9)
    ids = torch.randint(64, (3, 6))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        call = {"input_ids": ids[:, :1], "past_key_values": deepcopy(cache)}
        program = pipeline(model, mb_kwargs=call, split_spec={"model.layers.2": SplitPoint.BEGINNING}, check=None).program
    tensors = [name for layer in cache.layers for name, part in vars(layer).items() if isinstance(part, torch.Tensor)]
    assert len(program.lanes) == len(tensors) == 4 * (2 if kind == "dynamic" else 3)
    assert {lane.stages for lane in program.lanes} == {(0,), (1,)}
    kept = {lane.given for lane in program.lanes} | {program.outputs[lane.left] for lane in program.lanes if lane.left is not None}
    crossing = [transfer.value for transfer in program.transfers if transfer.source is not None and transfer.route != "recompute"]
    assert crossing
    assert not kept.intersection(crossing)
    hidden = 3 * 32 * 4
    assert hidden <= sum(_bytes(value.type) for value in crossing) <= 2 * hidden


def _bytes(kind: Any) -> int:
    sizes = {"f32": 4, "i64": 8, "b8": 1}
    return int(torch.Size(kind.shape).numel()) * sizes[kind.dtype]
