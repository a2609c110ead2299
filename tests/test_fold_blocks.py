"""fold-blocks: equal blocks are calls of one function, which says the same in fewer lines."""

from __future__ import annotations

import re
from typing import Any

import profiles  # noqa: F401  # loads the profile of this run
import pytest
import torch
from compare import assert_same
from helpers import Bless, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from repeated import BLOCKS, DIFFERENCES, WIDTH, Made, model_of
from torch import nn

from stagecut import CaptureError, SplitPoint, pipeline
from stagecut.backend.stages.emit import emit
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import EmitError, PassError, StagecutError, UnknownNameError
from stagecut.ir.graph import CALL, Program, functions_of
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.interp import run
from stagecut.ir.text.life import life_of_value
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.canonicalize import Canonicalize
from stagecut.passes.fold_blocks import fold_blocks, folded_text, unfold
from stagecut.passes.runner import run_passes
from stagecut.pipe import lower

X = torch.ones(4, WIDTH)


def check_folds(program: Program) -> str:
    """A folded program is valid, reads back, and is the program again when it is unfolded, name by name."""
    whole, folded = text(program), folded_text(program)
    assert text(program) == whole
    again = parse(folded)
    verify(again)
    assert text(again) == folded
    unfold(again)
    verify(again)
    assert text(again) == whole
    assert folded_text(again) == folded
    return folded


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x * self.scale)))


class Net(nn.Module):
    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((expert(x) for expert in self.experts), x).relu()


class Groups(Net):
    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleList(Group() for _ in range(4))


def program_of(model: nn.Module, *args: Any, cuts: tuple[str, ...] = ()) -> Program:
    """The linked program of a model that is cut before some modules."""
    torch.manual_seed(0)
    return pipeline(model, args, split_spec=dict.fromkeys(cuts, SplitPoint.BEGINNING), check=None).program


def anywhere(program: Program) -> str:
    """The folded text without the lines of this file."""
    lines = check_folds(program).splitlines(keepends=True)
    return "".join(re.sub(r" at \w+\.py:\d+", "", line) for line in lines if not line.startswith("  file "))


def test_blocks_are_functions(bless: Bless) -> None:
    bless("fold-blocks.ir", anywhere(program_of(Net(), torch.ones(2, 4), cuts=("layers.2",))))


class Heads(nn.Module):
    """Three results of one op, which have numbers in their names."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 3, 4).unbind(1)
        return x + self.out(q * k + v)


def test_values_have_the_same_names_when_a_folded_text_is_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4), *[Heads() for _ in range(8)])
    folded = check_folds(program_of(model, torch.ones(2, 4), cuts=("5.out", "7.out")))
    assert folded.count("= call ") == 6
    assert "%unbind_12, %unbind_13, %unbind_14 = " in folded


def test_names_inside_of_a_function_are_none_of_the_program() -> None:
    program = parse(folded_text(program_of(Net(), torch.ones(2, 4))))
    unfold(program)
    with pytest.raises(UnknownNameError, match=r"no value '%\.linear_1'") as caught:
        life_of_value(program, "%.linear_1")
    assert "one value of each call" in str(caught.value.hint)


def test_a_call_whose_names_do_not_count_stays_open() -> None:
    program = program_of(Net(8), torch.ones(2, 4))
    whole = text(program)
    assert check_folds(program).count("= call ") == 6
    odd = parse(re.sub(r"%relu_2\b", "%mine", whole))
    folded = check_folds(odd)
    assert folded.count("= call ") == 4  # nor does that after it: its `relu_3` would be `relu_2`
    assert "%mine = " in folded


class Written(Net):
    """Each block writes what it has made."""

    class Block(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            y.add_(1)
            y.view(-1).mul_(2)
            return x + self.second(y)

    def __init__(self) -> None:
        super().__init__(0)
        self.layers = nn.ModuleList(self.Block() for _ in range(6))


def test_versions_of_values_have_the_same_names_when_a_folded_text_is_read() -> None:
    folded = check_folds(program_of(Written(), torch.ones(2, 4)))
    assert folded.count("= call ") == 4
    assert "%.add_ -> %.add_.1" in folded


def test_functions_call_functions(bless: Bless) -> None:
    bless("fold-blocks-nested.ir", anywhere(program_of(Groups(), torch.ones(2, 4), cuts=("layers.2",))))


def test_a_block_that_is_cut_stays_open() -> None:
    folded = check_folds(program_of(Net(), torch.ones(2, 4), cuts=("layers.2.second",)))
    assert folded.count("= call layers(") == 3


@settings(max_examples=15)
@given(
    st.sampled_from([*DIFFERENCES]),
    st.sampled_from(BLOCKS),
    st.booleans(),
    st.integers(3, 6),
    st.integers(0, 5),
)
def test_a_folded_program_is_the_program(difference: str, block: Made, training: bool, count: int, k: int) -> None:
    model = model_of(block, count, [k % count], DIFFERENCES[difference], training)
    try:
        program, bindings, _ = lower(model, (X,), {}, None, (), batches=False)
    except CaptureError:
        return  # a model that is refused has no program
    check_folds(program)
    assert_computes_the_same(program, bindings)


def assert_computes_the_same(program: Program, bindings: Bindings) -> None:
    """The interpreter finds the same results and the same state, or the same refusal, in the folded program."""
    folded = parse(folded_text(program))
    seen: list[Any] = []
    for form in (program, folded):
        torch.manual_seed(3)
        try:
            with torch.no_grad():
                outputs, state = run(form, [X], bindings.tensors, bindings)
            seen.append([*outputs, *state.values()])
        except StagecutError as error:
            seen.append([str(type(error))])
    assert_same(*seen, "folded")


def test_the_interpreter_runs_functions() -> None:
    program, bindings, _ = lower(Groups(), (torch.ones(4, 4),), {}, None, (), batches=False)
    folded = parse(folded_text(program))
    assert len(functions_of(folded.ops)) == 2
    x = torch.randn(4, 4)
    expected, _ = run(program, [x], bindings.tensors)
    found, _ = run(folded, [x], bindings.tensors)
    assert torch.equal(found[0], expected[0])


HEAD = "program @P phase=traced {\n  input %x : f32[4]\n"
FUNCTION = "  function f (%a : f32[4]) {\n    state @w : param f32[4]\n    %b = torch.mul(%a, @w) : f32[4]\n    yield %b\n  }\n"
STATE = "  states @m.0-1 of f\n"


def folded_program(*ops: str, functions: str = FUNCTION, state: str = STATE) -> str:
    body = "".join(f"  {op}\n" for op in ops)
    return f"program @P phase=traced {{\n{functions}  input %x : f32[4]\n{state}{body}  output (%x,)\n}}\n"


def test_a_call_reads_the_state_of_its_module() -> None:
    program = parse(folded_program("%y = call f(%x) : f32[4] in m.1"))
    verify(program)
    (call,) = program.ops
    assert call.target == CALL
    assert [value.owner.name for value in call.args[1]] == ["m.1.w"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("op", "why"),
    [
        ("%y = call f(%x, %x) : f32[4] in m.0", "V27: other operands"),
        ("%y = call f() : f32[4] in m.0", "V27: other operands"),
        ("%y = call f(%x) : f32[5] in m.0", "V27: other results"),
        ("call f(%x) in m.0", "V27: other results"),
        ("%y = stagecut.call(%x) : f32[4] in m.0", "V27: not a call of one function"),
    ],
)
def test_a_call_fits_its_function(op: str, why: str) -> None:
    with pytest.raises(StagecutError, match=why):
        verify(parse(folded_program(op)))


def test_a_call_is_given_the_state_of_its_module() -> None:
    program = parse(folded_program("%y = call f(%x) : f32[4] in m.0"))
    (call,) = program.ops
    call.set_operands((call.args[0], [program.state[1].value]), {})
    with pytest.raises(StagecutError, match=r"V27: %m\.1\.w is not 'w' of the module"):
        verify(program)


def test_a_function_sees_only_what_it_is_given() -> None:
    program = parse(folded_program("%y = call f(%x) : f32[4] in m.0"))
    (function,) = functions_of(program.ops)
    function.ops[0].replace_operand(function.inputs[0], program.inputs[0])
    with pytest.raises(StagecutError, match="V6: %x is read, but not defined before in region f"):
        verify(program)


def test_functions_have_names_of_their_own() -> None:
    program = parse(
        folded_program(
            "%y = call f(%x) : f32[4] in m.0", "%z = call g(%x) : f32[4] in m.1", functions=FUNCTION + FUNCTION.replace("f (", "g (")
        )
    )
    functions_of(program.ops)[1].name = "f"
    with pytest.raises(StagecutError, match="V27: two functions are named 'f'"):
        verify(program)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (folded_program("%y = call g(%x) : f32[4] in m.0"), "unknown function 'g': known: 'f'"),
        (folded_program("%y = call f(%x) : f32[4] in m.2"), "function 'f' reads 'm.2.w' here"),
        (folded_program("%y = call f(%x) : f32[4]"), "function 'f' reads '.w' here"),
        (folded_program(functions=FUNCTION * 2), "function 'f' is defined twice"),
        (folded_program(state=STATE + "  states @m.1 of f\n"), "the state of 'm.1' is defined twice"),
        (folded_program(state=STATE + "  state @m.1.w : param f32[4]\n"), "state 'm.1.w' is defined twice"),
        (folded_program(state="  states @m.1-0 of f\n"), "not the paths of modules in a row"),
        (folded_program(state="  states @m-3 of f\n"), "not the paths of modules in a row"),
        (folded_program(functions=FUNCTION.replace("@w)", "@v)")), "unknown state 'v'"),
        (folded_program(functions=FUNCTION.replace("%a, ", "%x, ")), "%x is not defined"),
    ],
)
def test_what_is_no_function(source: str, why: str) -> None:
    assert why in str(refusal(source))


def test_passes_and_stages_take_the_long_form() -> None:
    program = program_of(Net(), torch.ones(2, 4), cuts=("layers.2",))
    fold_blocks(program)
    with pytest.raises(PassError, match="long form"):
        run_passes(program, [Canonicalize()])
    with pytest.raises(EmitError, match="long form"):
        emit(program, Bindings())


@pytest.mark.parametrize("kind", ["state", "argument", "view of state"])
def test_what_a_call_cannot_say_stays_open(kind: str) -> None:
    class Odd(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x)).neg().exp()
            if kind == "state":
                self.scale.add_(1)
            if kind == "argument":
                x.add_(1)
            if kind == "view of state":
                return self.second(y), self.scale.view(2, 2)  # type: ignore[return-value]
            return self.second(y)

    class OddNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Odd() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            for layer in self.layers:
                y = layer(x)
                x = y[0] + y[1].sum() if isinstance(y, tuple) else x + y
            return x

    assert "call" not in check_folds(program_of(OddNet(), torch.ones(2, 4)))


def test_a_layer_more_is_a_line_more() -> None:
    short, long = (check_folds(program_of(Net(count), torch.ones(2, 4))) for count in (12, 36))
    assert long.count("\n") == short.count("\n") + 24
