"""Arguments of the wrong kind, values that cannot cross, and modules that a trace cannot look into: errors that say so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cluster.matrix import on_ranks
from torch import nn
from torch.export import Dim, export

import stagecut
from stagecut import Balanced, CaptureError, ChangedError, Driver, InputError, SplitError, SplitPoint, StagecutError, pipe_split, pipeline
from stagecut.backend.ranks.wire import port
from stagecut.ir.graph import Program, Value
from stagecut.ir.types import TensorType


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split_spec": ["b"]}, r"split_spec=\['b'\] is a list\n  try: split_spec="),
        ({"split_spec": "b"}, "split_spec='b' is a str"),
        ({"split_spec": {3: SplitPoint.BEGINNING}}, "split_spec names 3, which is no path"),
        ({"stages": "2"}, "stages='2' is a str\n  try: stages=a whole number"),
        ({"stages": 2.0}, "stages=2.0 is a float"),
        ({"stages": True}, "stages=True is a bool"),
        ({"split_policy": 3}, "split_policy=3 is a int"),
        ({"routes": ["x"]}, r"routes=\['x'\] is a list"),
        ({"tied": None}, "tied=None is not known"),
        ({"stages": 2, "leaf_modules": "a"}, r"no list of paths\n  try: leaf_modules=\['a'\]"),
        ({"split_policy": Balanced(2, profile_on="nowhere")}, "profile_on='nowhere' is no device of this machine"),
        ({"split_policy": Balanced(2, profile_on="cuda:99")}, "profile_on='cuda:99' is no device of this machine"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises((InputError, SplitError), match=words):
        pipeline(Two(), (torch.randn(2, 4),), **options)


def _annotated(p: Program) -> list[int]:
    return [len(p.ops) // 2]


def _named(program: Any) -> list[int]:
    return [len(program.ops) // 2]


def _named_otherwise(prog: Any) -> list[int]:
    return [len(prog.ops) // 2]


def _with_positions(_: Any) -> list[int]:
    return [1]


def _wrong_inside(graph: Any) -> Any:
    return graph.graph.ops


def test_a_policy_is_known_by_the_name_or_the_annotation_of_its_argument() -> None:
    for policy in (_annotated, _named):
        assert len(pipeline(Two(), (torch.ones(2, 4),), split_policy=policy, check=None).stages) == 2


@pytest.mark.parametrize(
    ("policy", "words"), [(_named_otherwise, "which has no attribute 'ops'"), (_with_positions, "returned list, not a GraphModule")]
)
def test_a_policy_that_is_given_the_other_kind_is_told_how_to_name_its_argument(policy: Any, words: str) -> None:
    with pytest.raises(SplitError, match=words) as raised:
        pipeline(Two(), (torch.ones(2, 4),), split_policy=policy)
    assert "try: def policy(program), with that name, is given the Program" in str(raised.value)
    assert "test_wrong_kinds.py:" in raised.value.where
    with pytest.raises(AttributeError, match="ops"):
        pipeline(Two(), (torch.ones(2, 4),), split_policy=_wrong_inside)


def test_a_compiled_model_is_cut_under_the_names_of_the_one_that_was_written() -> None:
    model, x = Two(), torch.randn(2, 4)
    pipe = pipeline(torch.compile(model, backend="eager"), (x,), stages=2)  # type: ignore[arg-type]
    assert pipe.state_dict().keys() == model.state_dict().keys()
    (note,) = pipe.notes
    assert "without `_orig_mod.`" in note
    model.a = nn.Linear(4, 4)
    with pytest.raises(ChangedError):
        pipe(x)


@pytest.mark.parametrize("path", ["", "inner."])
def test_a_model_with_copies_on_other_devices_is_refused_with_the_module_to_cut(path: str) -> None:
    wrapped: nn.Module = nn.DataParallel(Two())
    if path:
        wrapped = nn.ModuleDict({"inner": wrapped})
    with pytest.raises(InputError, match=rf"is a DataParallel, and its stages .*\n  try: .*model\.{path}module"):
        pipeline(wrapped, (torch.randn(2, 4),), stages=2)


def test_a_stage_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="'0' is no stage"):
        pipeline(Two(), (torch.randn(2, 4),), stages=2).materialize("0")  # type: ignore[arg-type]


def test_classes_that_users_meet_are_imported_from_the_package() -> None:
    for name in ("BuiltStage", "PipeInfo", "PipedModel", "Plan", "Program", "Report", "Stage", "StepLosses", "Timeline"):
        assert isinstance(getattr(stagecut, name), type)


class Odd(nn.Module):
    """A value of another dtype crosses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(self.dtype)
        pipe_split()
        return y.to(torch.float32)


class Sparse(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to_sparse()
        pipe_split()
        return y.to_dense() * 2


def test_a_dtype_that_no_program_holds_is_named() -> None:
    with pytest.raises(CaptureError, match=r"a tensor of torch\.bits8, which no program can hold"):
        pipeline(Odd(torch.bits8), (torch.ones(2, 4),), check=None)


def test_unsigned_numbers_cross_and_sparse_tensors_are_refused() -> None:
    pipes = [pipeline(Odd(dtype), (torch.ones(2, 4),), check=None) for dtype in (torch.uint16, torch.uint32, torch.uint64)]
    assert on_ranks(2, _cross, pipes, pipeline(Sparse(), (torch.ones(2, 4),), check=None)) == ["ok", "ok"]


def _cross(pipes: list[Any], sparse: Any) -> str:
    x = torch.arange(16.0).view(4, 4) * 4000
    for pipe in pipes:
        assert port(pipe.program.stages[0].outputs[0], {}).wire_dtype.is_signed
        driver = Driver(pipe, "GPipe", 2)
        out, _ = driver.eval(x)
        assert not driver.is_last or torch.equal(out, x)
    group = torch.distributed.new_group()
    with pytest.raises(StagecutError, match="cannot cross to another process: its layout is sparse_coo"):
        Driver(sparse, "GPipe", 2, group=group).eval(x)  # type: ignore[arg-type]
    return "ok"


def test_a_size_that_nobody_told_is_no_size_that_depends_on_data() -> None:
    program = export(Two(), (torch.randn(4, 4),), dynamic_shapes=({0: Dim("batch", min=2, max=9)},))
    value = pipeline(program, stages=2).program.stages[0].outputs[0]
    with pytest.raises(StagecutError, match=r"varies, and nobody has said how large it is\n  at: .*, op aten"):
        port(value, {})
    with pytest.raises(StagecutError, match="its size u0 depends on data"):
        port(Value(TensorType("f32", ("u0",)), "found"), {})


def test_quantized_modules_of_torch_are_kept_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Two().eval(), {nn.Linear}, torch.qint8)
        x = torch.randn(4, 4)
        for kept in (["a", "b"], ["a"], []):
            pipe = pipeline(model, (x,), split_spec={"b": SplitPoint.BEGINNING}, leaf_modules=kept)
            assert torch.equal(pipe(x)[0], model(x))
            assert bool(pipe.notes) is (len(kept) < 2)
