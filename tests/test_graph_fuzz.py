"""Random models run by graphs do what their stages do under autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fuzz.judge import calls, draw, quiet
from fuzz.plans import build, options
from torch import nn

from stagecut import CaptureError, Pipe, SplitError, StagecutError, pipeline
from stagecut.backend.stages.crossing import refuse_feedback, written_inputs
from stagecut.backend.stages.graphs import Graphs
from stagecut.backend.stages.roles import RoleCode
from stagecut.backend.stages.run import results_of
from stagecut.ir.graph import Value

SEED, PROGRAMS = 2027, 12


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    quiet()


def test_random_models_get_the_gradients_of_autograd() -> None:
    by_graphs = 0
    for index in range(PROGRAMS):
        plan, _ = draw(SEED, index)
        model = build(plan)
        args, kwargs = calls(plan)[0]
        try:
            pipe = pipeline(model, args, kwargs, **options(plan))
            refuse_feedback(pipe.program)
        except (CaptureError, SplitError, StagecutError):
            continue
        twin = copy.deepcopy(pipe)
        graphs = [Graphs(pipe, stage, RoleCode(), recompute=bool(index % 2)) for stage in range(pipe.num_stages)]
        mine = _run(pipe, calls(plan)[0], graphs)
        expected = _run(twin, calls(plan)[0], [])
        by_graphs += sum(not stage.note for stage in graphs)
        assert mine.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6, equal_nan=True, msg=f"program {index}, {name}")
    assert by_graphs > PROGRAMS


def _run(pipe: Pipe, call: Any, graphs: list[Graphs]) -> dict[str, torch.Tensor]:
    """The outputs, the gradients that there are, and the buffers, by name."""
    torch.manual_seed(7)
    values: dict[Value, Any] = dict(zip(pipe.program.inputs, pipe.flatten(*call), strict=True))
    for block in pipe.program.stages:
        written = written_inputs(block)
        given = [values[value].clone() if value in written else values[value] for value in block.inputs]
        outputs = _stage(pipe.stages[block.index], block, given, graphs)
        values |= zip(block.outputs, outputs, strict=True)
    returned = {f"output {i}": values[v] for i, v in enumerate(pipe.program.outputs) if isinstance(v, Value)}
    tensors = {name: leaf for name, leaf in returned.items() if isinstance(leaf, torch.Tensor)}
    losses = [leaf.abs().square().mean().double() for leaf in tensors.values() if leaf.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    for stage in reversed(graphs):
        stage.take_weights()()
    grads = {f"gradient of {name}": p.grad for name, p in pipe.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in pipe.named_buffers()}
    return {name: leaf.detach() for name, leaf in (tensors | grads | buffers).items()}


def _stage(stage: nn.Module, block: Any, given: list[Any], graphs: list[Graphs]) -> Any:
    if graphs:
        graphs[block.index].begin(stage)
        outputs = graphs[block.index].run(given)
        if outputs is not None:
            return outputs
    return results_of(stage(*given), block)
