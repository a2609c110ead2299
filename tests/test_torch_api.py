"""`import stagecut as pp` where `import torch.distributed.pipelining as pp` stood: names, and what a pipe of torch has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.pipelining as torchs
from test_pipe import Aliased, FourMlps, Skipping, X, Y
from torch import fx, nn

import stagecut as pp
from stagecut.backend.schedules import SCHEDULES


@pytest.mark.parametrize("name", torchs.__all__)
def test_every_public_name_of_torch_is_here(name: str) -> None:
    """The frontend's are ours; schedules and the manual stage are torch's own."""
    ours = name in ("Pipe", "SplitPoint", "pipe_split", "pipeline", "build_stage")
    assert (getattr(pp, name) is getattr(torchs, name)) is not ours
    assert name in pp.__all__
    assert name in dir(pp)


def test_every_schedule_is_here() -> None:
    assert {f"Schedule{name}" for name in SCHEDULES} <= set(pp.__all__)


def test_split_gm_calls_the_stages() -> None:
    """Its children are the stages, and it computes what the pipe does."""
    pipe = pp.pipeline(Skipping(pp.pipe_split).double(), (X, Y))
    split = pipe.split_gm
    assert isinstance(split, fx.GraphModule)
    assert list(split.children()) == pipe.stages
    assert [name for name, _ in split.named_children()] == [f"submod_pp_{i}" for i in range(4)]
    assert [node.op for node in split.graph.nodes if node.op != "call_function"] == ["placeholder"] * 2 + ["call_module"] * 4 + ["output"]
    torch.testing.assert_close(split(X, Y), pipe(X, Y), rtol=0, atol=0)
    assert not any(isinstance(module, fx.GraphModule) for module in pipe.modules())


def test_replicated_params_are_those_of_several_stages() -> None:
    """Under the name each stage has."""
    pipe = pp.pipeline(Skipping(pp.pipe_split).double(), (X, Y))
    assert pipe.replicated_params == [{"submod_pp_0": "square", "submod_pp_1": "square"}]
    assert pp.pipeline(FourMlps(pp.pipe_split).double(), (X, Y)).replicated_params == []
    for names in (aliased := pp.pipeline(Aliased(pp.pipe_split).double(), (X, Y))).replicated_params:
        first, second = (aliased.split_gm.get_submodule(stage).get_parameter(name) for stage, name in names.items())
        assert first is second


def test_print_readable_shows_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pp.pipeline(Skipping(pp.pipe_split).double(), (X, Y))
    pipe.print_readable()
    shown = capsys.readouterr().out
    assert "submod_pp_1 = self.submod_pp_1(getitem_1)" in shown
    assert all(stage.code in shown for stage in pipe.stages)


def test_what_torch_tells_of_a_pipe() -> None:
    info = pp.pipeline(FourMlps(pp.pipe_split).double(), (X, Y)).info()
    assert (info.num_stages, info.has_loss_and_backward) == (4, False)


class Graph(nn.Module):
    """Its parts are called as attributes of our stages are."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.input_types = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, lambda_: torch.Tensor) -> torch.Tensor:
        return self.input_types(self.graph(lambda_))  # type: ignore[no-any-return]


def test_a_model_may_have_modules_of_these_names() -> None:
    model = Graph().double()
    pipe = pp.pipeline(model, (X,), split_spec={"input_types": pp.SplitPoint.BEGINNING})
    assert pipe.num_stages == 2
    assert [node.op for node in pipe.stages[0].graph.nodes] == ["placeholder", "get_attr", "output"]
    assert set(pipe.state_dict()) == set(model.state_dict())
