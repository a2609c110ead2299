"""IR text from a stranger: nothing in it reaches Python but checked names, and it fails only as a StagecutError."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import refusal
from torch import nn

from stagecut import pipeline
from stagecut.backend.stages.emit import emit
from stagecut.backend.stages.modules import Stage
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import EmitError, StagecutError
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.call import check_inputs
from stagecut.ir.run.interp import run
from stagecut.ir.sizes import evaluate, expression
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text

X = torch.arange(4.0)
NEG = "%y = aten.neg.default(%x) : f32[4]"
STATE = "  state @{0} : param f32[4] stages(0)\n"
MUL = "%z = aten.mul.Tensor(%x, @{0}) : f32[4]\n    %y = aten.neg.default(%z) : f32[4]"


def program(ops: str = NEG, *, name: str = "@P", head: str = "", holds: str = "", shape: str = "f32[4]") -> str:
    """A linked program of one stage around `ops`, which make %y of %x."""
    held = f"    holds @{holds}\n" if holds else ""
    stage = f"  stage 0 (%x) -> (%y) {{\n{held}    {ops}\n  }}\n  transfer %x : input -> 0 feed\n"
    return f"program {name} phase=linked stages=1 {{\n{head}  input %x : {shape}\n{stage}  output (%y)\n}}\n"


def with_state(name: str, ops: str) -> str:
    """The same, with a parameter of that name that the stage holds."""
    return program(ops, holds=name).replace("  stage 0", STATE.format(name) + "  stage 0")


def stage_of(source: str, **tensors: torch.Tensor) -> Stage:
    """The stage that `source` describes."""
    read = parse(source)
    verify(read)
    return emit(read, Bindings(tensors=dict(tensors)))[0]


def refused(source: str, **tensors: torch.Tensor) -> EmitError:
    """The error with which `source` is refused when it is emitted."""
    with pytest.raises(EmitError) as caught:
        stage_of(source, **tensors)
    return caught.value


@pytest.mark.parametrize("escape", ["\\n", "\\r", "\\u2028", "\\u000b", "\\u0000", "\\ud800"])
def test_file_name_cannot_leave_its_comment(escape: str) -> None:
    """A line break in the name of a source file once put what followed it into the function that is compiled."""
    path = f"a{escape}    torch.escaped = True{escape}#"
    stage = stage_of(program(f"{NEG} at a.py:1", head=f'  file a.py "{path}"\n'))
    assert torch.equal(stage(X), -X)
    assert not hasattr(torch, "escaped")
    assert "\n    torch" not in stage.code


def test_source_files_of_strangers_are_not_read(tmp_path: Path) -> None:
    """Lines of any file of this machine once showed up in the code, and a device file would never end."""
    secret = tmp_path / "secret"
    secret.write_text("password\n", encoding="utf-8")
    stage = stage_of(program(f"{NEG} at a.py:1", head=f'  file a.py "{secret}"\n'))
    assert "secret:1" in stage.code
    assert "password" not in stage.code


@pytest.mark.parametrize("name", ["a\\nimport os", "a\\u0000b", "a\\ud800b"])
def test_name_of_the_model_may_be_anything(name: str) -> None:
    stage = stage_of(program(name=f'@"{name}"'))
    assert torch.equal(stage(X), -X)
    assert "\nimport" not in "\n".join(fn.__code__.co_filename for fn in stage._forwards)


@pytest.mark.parametrize(
    "size", ['__import__("os").getcwd()', "s0.__class__", "[s0]", "lambda: 0", "'a'", "exec('1')", "_s", "s0;s1", "{s0}"]
)
def test_sizes_are_expressions_over_sizes(size: str) -> None:
    """sympify evaluates its text as Python: a size such as __import__("os") ran when the program was called."""
    assert refusal(program(shape=f"f32[{size}]")) is not None


@pytest.mark.parametrize(
    "size",
    [
        "exec(s0)",
        "s0 if s0 else 1",
        "s0 or 1",
        "open(s0)",
        "Symbol(s0)",
        "9**9**9",
        "9**99999",
        "((((9**64)**64)**64)**64)",
        "(" * 300 + ")" * 300,
    ],
)
def test_expressions_call_known_functions_only(size: str) -> None:
    with pytest.raises(StagecutError, match="no expression over sizes"):
        expression(size, {})
    assert evaluate(size, (("s0", 3),)) is None


@pytest.mark.parametrize(
    ("size", "value"),
    [
        ("2*s0", 6),
        ("s0//2", 1),
        ("Max(1, s0)", 3),
        ("s0**2 - 1", 8),
        ("-s0 + 4", 1),
        ("Mod(s0, 2)", 1),
        ("s0 % 2", 1),
        ("CeilDiv(s0, 2)", 2),
    ],
)
def test_expressions_mean_what_they_say(size: str, value: int) -> None:
    assert evaluate(size, (("s0", 3),)) == value


def test_derived_sizes_are_checked_without_evaluation() -> None:
    read = parse(program(shape="f32[2*s0]"))
    assert check_inputs(read.inputs, [X]) == {"s0": 2}


@pytest.mark.parametrize(
    "op",
    [
        'aten.from_file.default("f", True, 4)', 'aten.from_file.out("f", True, 4, out=%x)', 'aten.from_file("f")',
        'aten.save.default(%x, "f")',
        'torch.ops.debugprims.load_tensor.default("f", [4], [1])', 'torch.ops.prim.RaiseException.default("f", "f")',
        'torch.ops.higher_order.wrap(%x)',
        'torch.ops.higher_order.print("f")', 'torch.ops.load_library("f")', 'method.neg()', 'module.a(%x)', 'module.a(1, 2, 3)',
        'aten.neg.default(%x, __debug__=1)', 'method.neg(1)', 'aten.add.Tensor(%x, torch.load)', 'aten.add.Tensor(%x, {torch.load: 1})',
    ],
)  # fmt: skip
def test_op_that_is_more_than_tensor_code_is_refused(op: str) -> None:
    """Registered ops that open files were once called like any other."""
    refused(program(f"%r = {op} : object\n    {NEG}"))


def test_op_finds_no_function_at_run_time() -> None:
    """getattr gave bound methods, and max(key=) calls what it is given."""
    source = program(
        '%s = method.untyped_storage(%x) : object\n    %f = builtins.getattr(%s, "from_file") : object\n'
        f'    %m = builtins.max(["f"], key=%f) : object\n    {NEG}'
    )
    with pytest.raises(EmitError, match="from_file"):
        stage_of(source)(X)
    with pytest.raises(EmitError, match="from_file"):
        run(parse(source), [X], {})


def test_constant_of_the_interpreter_is_one_of_torch() -> None:
    """`torch.load` was once an operand of the reference interpreter."""
    source = program(f'%m = builtins.max(["f"], key=torch.load) : object\n    {NEG}')
    with pytest.raises(EmitError, match=r"torch\.load"):
        run(parse(source), [X], {})


def test_attributes_that_are_data_are_read() -> None:
    stage = stage_of(program('%r = builtins.getattr(%x, "real") : f32[4]\n    %y = aten.neg.default(%r) : f32[4]'))
    assert torch.equal(stage(X), -X)


@pytest.mark.parametrize(
    "name",
    ["_modules", "_parameters", "_buffers", "training", "_forward_hooks", "_non_persistent_buffers_set"],
)
def test_tensor_has_no_name_of_nn_module(name: str) -> None:
    refused(with_state(name, MUL.format(name)), **{name: nn.Parameter(X)})
    refused(with_state(f"a.{name}", MUL.format(f"a.{name}")), **{f"a.{name}": nn.Parameter(X)})


@pytest.mark.parametrize(
    "name",
    [
        "_code",
        "_texts",
        "_forwards",
        "_constants",
        "_here",
        "code",
        "index",
        "input_names",
        "add_call",
        "_title",
        "forward",
        "to",
        "__class__",
    ],
)
def test_tensor_and_module_may_have_a_name_of_ours(name: str) -> None:
    """A model may use it, so it is kept aside; no attribute of the class is reached by it."""
    stage = stage_of(with_state(f"{name}.{name}", MUL.format(f"{name}.{name}") + f" in {name}"), **{f"{name}.{name}": nn.Parameter(X + 1)})
    assert torch.equal(stage(X), -X * (X + 1))


@pytest.mark.parametrize("path", ["_modules.clear", "_parameters.update", "training", "_forward_hooks.clear", "a._buffers"])
def test_module_has_no_name_of_nn_module(path: str) -> None:
    """`in _modules.clear` once called the method of the dict."""
    refused(program(f"{NEG} in {path}"))


@pytest.mark.parametrize("name", ["half", "forward", "_modules", "training", "__class__"])
def test_constant_may_have_any_name(name: str) -> None:
    """It is a plain attribute of the model, and lies in a table of its own."""
    source = with_state(name, MUL.format(name)).replace("param", "const")
    assert torch.equal(stage_of(source, **{name: X + 1})(X), -X * (X + 1))


@pytest.mark.parametrize("path", ["forward", "__class__", "train", "to.half", "a.__init__"])
def test_module_behind_a_method_is_found(path: str) -> None:
    """`self.train` is a method, so such a module is looked up where modules are."""
    assert torch.equal(stage_of(program(f"{NEG} in {path}"))(X), -X)


def test_name_is_a_tensor_or_a_module() -> None:
    """`in a.tolist`, where @a is a tensor, once called the tensor's own method."""
    refused(with_state("a", f"{MUL.format('a')} in a.tolist"), a=nn.Parameter(X))
    refused(with_state("a", f"{MUL.format('a')} in a"), a=nn.Parameter(X))


@pytest.mark.parametrize("scope", ['""', '"a."', '".a"', '"a..b"', "/".join("a" * 100), ".".join("a" * 5000)])
def test_scope_is_a_path_of_few_modules(scope: str) -> None:
    refusal(program(f"{NEG} in {scope}"))


def test_state_name_is_a_path_of_few_modules() -> None:
    refusal(with_state(".".join("a" * 5000), NEG))
    refusal(with_state('"a..b"', NEG))


@pytest.mark.parametrize(
    "contexts",
    [
        ", ".join(["no_grad"] * 30), "autocast", "autocast()", "autocast([%x])", 'autocast("cpu\\n")', 'autocast("cpu", [1])', "checkpoint",
        "checkpoint(1)", 'checkpoint("a", True)', "transform", "transform(None)", "no_grad(1)", 'autocast("cpu", "x", True)',
    ],
)  # fmt: skip
def test_context_has_its_own_arguments(contexts: str) -> None:
    """Whatever stood there went into a `with` line, or was looked for and missing."""
    refusal(program(f"{NEG} with {contexts}"))


@pytest.mark.parametrize("device", ["a b", "cpu\\u0022", "cpu:99999", "CPU", ""])
def test_device_is_a_plain_name(device: str) -> None:
    refusal(program(f'%y = aten.full.default([4], 0, device=device("{device}")) : f32[4]'))


@pytest.mark.parametrize("name", ["1x", "_", "None", "class", "self", "torch", "aten", "__debug__", "__class__", "x.1", "print", "exec"])
def test_value_may_have_any_name(name: str) -> None:
    """`%1x` was no parameter, and `%_` was overwritten by the first result that nobody reads."""
    sort = (
        "%v, %i = aten.sort.default(%x) : f32[4], i64[4]\n    %w = aten.mul.Tensor(%x, %v) : f32[4]\n    %y = aten.neg.default(%x) : f32[4]"
    )
    assert torch.equal(stage_of(program(sort).replace("%x", f"%{name}"))(X), -X)


def test_argument_named_underscore_is_kept() -> None:
    """An op's result that nobody reads was bound to the same name."""

    class Model(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            values, _unread = torch.sort(_, descending=True)
            return values - _

    assert torch.equal(pipeline(Model(), (X,))(X)[0], X.flip(0) - X)


@pytest.mark.parametrize("part", ["inf", "-inf", "nan"])
def test_complex_number_may_be_infinite(part: str) -> None:
    """repr says `nanj`, which is no Python."""
    stage = stage_of(program(f"%z = aten.add.Tensor(%x, complex({part}, {part})) : c64[4]\n    {NEG}"))
    assert torch.equal(stage(X), -X)


def test_module_may_be_named_beyond_the_basic_plane() -> None:
    """JSON writes such a character as two."""
    name = "\U0001f600"
    stage = stage_of(with_state(f'"{name}.w"', MUL.format(f'"{name}.w"') + f' in "{name}"'), **{f"{name}.w": nn.Parameter(X + 1)})
    assert torch.equal(stage(X), -X * (X + 1))


def test_damaged_program_is_judged_in_linear_time() -> None:
    """Each violation once made the names of the whole program anew."""
    lines = "\n".join(f"  %a{i} = aten.neg.default(%x) : f32[4] views(%x, -)" for i in range(4000))
    with pytest.raises(StagecutError, match="4000 violation"):
        verify(parse(f"program @P phase=traced {{\n  input %x : f32[4]\n{lines}\n  output (%x)\n}}"))


def test_error_shows_the_neighbourhood_of_a_long_line() -> None:
    error = refusal(program(f"%y = aten.neg.default(%x, [{'1, ' * 100_000}$]) : f32[4]"))
    assert len(str(error)) < 1000
    assert "$" in str(error)
    assert math.isclose(error.column, 300_000, rel_tol=0.01)


@pytest.mark.parametrize("shape", ["9" * 400, ",".join(["9" * 18] * 30)])
def test_size_may_be_beyond_any_float(shape: str) -> None:
    """The number of bytes behind a transfer was made a float."""
    source = program(shape=f"f32[{shape}]")
    assert text(parse(text(parse(source)))) == text(parse(source))


def test_relay_lists_the_stages_it_passes() -> None:
    """The list of nine billion stages was made to compare it with the one in the text."""
    source = program().replace("output (", "transfer %y : 0 -> 9000000000 relay(1)\n  output (")
    assert "all 8999999999" in str(refusal(source))
