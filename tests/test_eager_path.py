"""The trace takes the path of the eager run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from stagecut import Pipe, pipeline


def _compares(make: type[nn.Module], *args: Any, **options: Any) -> Pipe:
    torch.manual_seed(0)
    return pipeline(make(), args, check="gradients", **options)


def _targets(pipe: Pipe) -> list[str]:
    return [op.target for op in pipe.program.all_ops()]


QUESTIONS = {
    "compiling": lambda: torch.compiler.is_compiling(),
    "imported by name": lambda: is_compiling(),
    "exporting": lambda: torch.compiler.is_exporting(),
    "dynamo": lambda: torch.compiler.is_dynamo_compiling(),
    "jit": lambda: torch.jit.is_tracing(),
    "of dynamo's module": lambda: torch._dynamo.external_utils.is_compiling(),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_who_asks_whether_it_is_traced_is_told_no(question: str) -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if QUESTIONS[question]() else x.cos()

    pipe = _compares(Asks, torch.randn(3))
    assert _targets(pipe) == ["aten.cos.default"]
    assert not pipe.notes


def test_a_fake_tensor_is_not_seen() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if isinstance(x, torch._subclasses.FakeTensor) else x.cos()

    assert _targets(_compares(Asks, torch.randn(3))) == ["aten.cos.default"]


def test_the_questions_are_torchs_own_again_afterwards() -> None:
    before = [torch.compiler.is_compiling.__code__, torch.compiler.is_exporting.__code__, torch.jit.is_tracing.__code__]
    package = type(torch._subclasses)
    _compares(nn.ReLU, torch.randn(3))
    with pytest.raises(Exception, match="branches"):
        pipeline(_Branches(), (torch.randn(3),))
    assert before == [torch.compiler.is_compiling.__code__, torch.compiler.is_exporting.__code__, torch.jit.is_tracing.__code__]
    assert type(torch._subclasses) is package


class _Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x.sum() > 0 else x.cos()


def _is_all_ones(mask: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return bool((mask == 1).all())


class _Masked(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x if _is_all_ones(mask) else x * mask


class _TwoMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by_input = _Masked()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            x = x + 1
        return self.by_input(x, mask) if not _is_all_ones(torch.ones(3)) else self.by_input(x, mask).cos()


def test_only_the_function_that_cannot_be_traced_takes_the_path_of_a_trace() -> None:
    pipe = _compares(_TwoMasks, torch.randn(3), torch.ones(3))
    assert _targets(pipe) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.cos.default"]
    (note,) = pipe.notes
    assert "_is_all_ones, called by _Masked" in note
    assert "test_eager_path.py" in note
    assert "other ops" in note
    what, where, otherwise = note.splitlines()
    assert len(what) < 300
    assert re.fullmatch(r"  at: .*test_eager_path\.py:\d+ in _is_all_ones: return bool\(\(mask == 1\)\.all\(\)\)", where)
    assert otherwise.startswith("  otherwise: leave out the input")


FAILURES = {
    "Expected inputs of BF16 type but got mat_a.dtype=torch.float32": "cut the model in a dtype that this line takes in a trace",
    "no kernel": "change that line so that torch.export can trace it",
    "data-dependent": "leave out the input that this line reads, such as a mask of ones",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_way_to_the_eager_path_fits_what_stands_in_it(failure: str) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return x + 1
            if isinstance(x, FakeTensor):
                raise RuntimeError(failure)
            return 1 + x

    (note,) = pipeline(Fails(), (torch.randn(3),), stages=1).notes
    assert note.endswith(f"\n  otherwise: {FAILURES[failure]}")


def test_where_the_eager_path_is_refused_that_of_a_trace_is_taken() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                self.calls += 1
                return x * (1 if self.calls < 100 else 2)
            return x * 1

    pipe = _compares(Counts, torch.randn(3))
    assert _targets(pipe) == ["aten.mul.Tensor"]
    assert "calls" in pipe.notes[0]
    assert "\n  otherwise: make it a buffer: register_buffer, changed in place, or keep the submodule" in pipe.notes[0]


def test_a_function_that_fails_on_both_paths_is_told_no_again_and_its_module_is_kept_whole() -> None:
    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin() if torch.compiler.is_compiling() else x.cos()
            return x + 1 if x.sum() > 0 else x - 1

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if torch.compiler.is_compiling() else self.part(x) * 2

    pipe = _compares(Whole, torch.randn(3))
    assert _targets(pipe) == ["module.part", "aten.mul.Tensor"]
    assert len(pipe.notes) == 1


# --- values that are known ----------------------------------------------------------------------------


def test_values_that_no_input_goes_into_are_known() -> None:
    class Known(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[0]).unsqueeze(0)
            steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
            if (steps != 1).any():
                return x.sin()
            if torch.tensor([1, 2]).tolist() == [1, 2] and int(torch.ones(3).sum()) == 3:
                return x.cos()
            return x

    assert _targets(_compares(Known, torch.randn(3))) == ["aten.cos.default"]


UNKNOWN = {
    "an input": lambda model, x: x,
    "a parameter": lambda model, x: model.weight,
    "a buffer": lambda model, x: model.buffer,
    "random": lambda model, x: torch.rand(3),
    "written": lambda model, x: torch.zeros(3).copy_(x),
}


@pytest.mark.parametrize("source", UNKNOWN)
def test_all_other_values_are_not_known(source: str) -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("buffer", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if UNKNOWN[source](self, x).sum() > 0 else x.cos()

    with pytest.raises(Exception, match="branches on a value"):
        pipeline(Unknown(), (torch.randn(3),))


def test_a_constant_that_is_written_through_a_view_is_not_known() -> None:
    class Written(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            constant = torch.zeros(3)
            view = constant[:1]
            assert not constant.any()
            view.copy_(x[:1])
            return x.sin() if constant.any() else x.cos()

    with pytest.raises(Exception, match="branches on a value"):
        pipeline(Written(), (torch.randn(3),))


def _through_its_base(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    constant = torch.zeros(3)
    return constant[:1], constant


def _through_a_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    constant = torch.zeros(3)
    return constant, constant.view(3, 1)


@pytest.mark.parametrize("made", [_through_its_base, _through_a_view])
@pytest.mark.parametrize("look", [torch.Tensor.any, torch.Tensor.sum])
def test_a_constant_that_was_known_before_it_was_written_is_not_known_any_more(made: Any, look: Any) -> None:
    class WrittenLater(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            read, written = made(x)
            if look(read):
                return x.sin()
            written.add_(x.view_as(written))
            return x.cos() if look(read) else x.tan()

    with pytest.raises(Exception, match="branches on a value"):
        pipeline(WrittenLater(), (torch.ones(3),), check=None)


def test_the_same_tensor_is_not_known_any_more_once_a_view_of_it_was_written() -> None:
    class Flagged(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flag = torch.zeros(())
            view = flag.view(1)
            if flag:
                return x.sin()
            view.copy_(x[:1])
            return x.cos() if flag else x.tan()

    with pytest.raises(Exception, match="branches on a value"):
        pipeline(Flagged(), (torch.ones(3),), check=None)


def test_values_that_are_compared_by_name_are_left_to_torch() -> None:
    class ByName(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if torch.equal(torch.ones(3), other=x) else x.cos()

    with pytest.raises(Exception, match="ByName cannot be traced"):
        pipeline(ByName(), (torch.ones(3),), check=None)


@pytest.mark.parametrize("looks_inside", [True, False])
@pytest.mark.parametrize("made_inside", [True, False])
def test_autocast_around_a_known_value_is_that_of_its_op(made_inside: bool, looks_inside: bool) -> None:
    """1.001 is 1.0 in bfloat16 alone. Where autocast has made the value, it is not known; where it is only looked at there, it is."""

    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=made_inside):
                value = torch.full((2, 2), 1.001) @ torch.eye(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=looks_inside):
                return x.sin() if (value == 1.0).any() else x.cos()

    if made_inside:
        with pytest.raises(Exception, match="branches on a value"):
            pipeline(Cast(), (torch.ones(3),), check=None)
    else:
        assert _targets(_compares(Cast, torch.ones(3))) == ["aten.cos.default"]


def test_a_size_that_varies_is_not_known() -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if torch.arange(x.shape[0]).sum() > 5 else x.cos()

    with pytest.raises(Exception, match="branches on a value"):
        pipeline(Sized(), (torch.randn(3),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
