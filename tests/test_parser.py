"""The parser: reads all the printer prints, and points at the character it cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import CASES, load, refusal

from stagecut.ir.graph import Block, Op, Program, Value, transform
from stagecut.ir.text.parser import MAX_DEPTH, parse
from stagecut.ir.text.printer import text
from stagecut.passes.pipeline import default_pipeline


class _Structure:
    """A program as plain data: values by number, nothing left out. Two programs are equal when these are."""

    def __init__(self, program: Program) -> None:
        self._numbers: dict[Value, int] = {}
        self.data = [
            program.name,
            program.phase,
            [(self._number(v), v.type) for v in program.inputs],
            [(self._number(e.value), e.names, e.kind, e.type, e.transient, e.stages, e.share) for e in program.state],
            [[a.tensor == b.tensor for a in program.state] for b in program.state],
            [[a.storage == b.storage for a in program.state] for b in program.state],
            [self._op(op) for op in program.ops],
            [(s.index, [self._op(op) for op in s.ops], {e.name: n for e, n in s.state.items()}) for s in program.stages],
            [([self._number(v) for v in s.inputs], [self._number(v) for v in s.outputs]) for s in program.stages],
            [(self._number(t.value), t.source, t.target, t.route) for t in program.transfers],
            self._tree(program.outputs),
        ]

    def _number(self, value: Value) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def _tree(self, tree: Any) -> Any:
        return transform(tree, lambda leaf: f"value {self._number(leaf)}" if isinstance(leaf, Value) else leaf)

    def _op(self, op: Op) -> list[Any]:
        regions = [self._region(region) for region in op.regions]
        results = [(self._number(v), v.type) for v in op.results]
        versions = [(self._number(a), self._number(b), b.type) for a, b in op.versions.items()]
        effects = [self._tree([*op.effects.writes, *op.effects.views]), op.effects.random, op.effects.effect]
        plain = [op.target, effects, op.place, op.form]
        return [*plain, self._tree(op.args), self._tree(op.kwargs), results, versions, regions]

    def _region(self, region: Block) -> list[Any]:
        params = [(self._number(v), v.type) for v in region.inputs]
        return [region.name, params, [self._op(op) for op in region.ops], self._tree(region.outputs)]


def assert_same_after_reading(program: Program) -> None:
    """The text of `program` reads back as the same program."""
    printed = text(program)
    again = parse(printed)
    assert text(again) == printed
    assert repr(_Structure(again).data) == repr(_Structure(program).data)


@pytest.mark.parametrize("path", sorted(CASES.glob("*.ir")), ids=lambda path: path.stem)
def test_round_trip(path: Path) -> None:
    assert_same_after_reading(parse(path.read_text(encoding="utf-8"), path.name))


def test_text_of_every_construct_is_canonical() -> None:
    """Below its first comment the case is what the printer prints, to the letter."""
    source = (CASES / "everything.ir").read_text(encoding="utf-8")
    assert text(parse(source)) == source.partition("\n")[2]


@pytest.mark.parametrize("case", ["writes", "modules", "sources", "crossing", "tied", "double-write", "written-sources"])
def test_round_trip_after_every_pass(case: str) -> None:
    program = load(case)
    for step in default_pipeline():
        step.run(program)
        assert_same_after_reading(program)


def test_comments_blank_lines_and_indent_mean_nothing() -> None:
    source = "# head\nprogram   @P\tphase=traced{# c\n\n\tinput  %x:f32[ 2 , s0 ] # c\r\n"
    source += "%a=aten.neg.default( %x ):f32[2,s0]\noutput(%a)}\n# tail\n"
    expected = "program @P phase=traced {\n  input %x : f32[2,s0]\n  %a = aten.neg.default(%x) : f32[2,s0]\n  output (%a,)\n}\n"
    assert text(parse(source)) == expected


HEAD = "program @P phase=traced {\n  input %x : f32[2]\n  state @w : param f32[2]\n"
"""Three lines; the bad line of the tests below is the fourth. `^` in it marks the character the error points at."""

BAD_LINES = [
    ("  %a = ^relu(%x) : f32[2]", "expected an op such as aten.add.Tensor, found 'relu'"),
    ("  %a = ^(%x) : f32[2]", "expected an op"),
    ("  %a ^aten.neg.default(%x) : f32[2]", "expected '='"),
    ("  %a, ^aten.neg.default(%x) : f32[2]", "expected a value name such as %x"),
    ("  %a, ^%a = aten.neg.default(%x) : f32[2], f32[2]", "%a is defined twice"),
    ("  ^%x = aten.neg.default(%x) : f32[2]", "%x is defined twice"),
    ("  %a = aten.neg.default ^%x", "expected '('"),
    ("  %a = aten.neg.default(%x ^%x) : f32[2]", "expected ','"),
    ("  %a = aten.neg.default(%x, ^", "expected an operand"),
    ("  %a = aten.neg.default(  ^%y) : f32[2]", "%y is not defined: known: 'x'"),
    ("  %a = aten.neg.default(^%a) : f32[2]", "%a is not defined: known: 'x'"),
    ("  %a = aten.neg.default(%x, ^@v) : f32[2]", "unknown state 'v': known: 'w'"),
    ("  %a = aten.neg.default(%x, ^@) : f32[2]", "expected a name such as @layers.0.weight"),
    ("  %a = aten.neg.default(%x, k=1, ^%x) : f32[2]", "positional operand after a keyword"),
    ("  %a = aten.neg.default(%x, k=1, ^k=2) : f32[2]", "keyword 'k' is given twice"),
    ("  %a = aten.neg.default(^foo) : f32[2]", "unknown literal 'foo'"),
    ("  %a = aten.neg.default(  ^complex(1, 2, 3)) : f32[2]", "bad complex(...)"),
    ('  %a = aten.neg.default(^complex("x")) : f32[2]', "bad complex(...)"),
    ("  %a = aten.neg.default({^[1]: 2}) : f32[2]", "a key is a string, a number or another plain literal"),
    ("  %a = aten.neg.default({ ^%x: 2}) : f32[2]", "a key is a string, a number or another plain literal"),
    ("  %a = aten.neg.default({1 ^2}) : f32[2]", "expected ':'"),
    ("  %a = aten.neg.default(<1^) : f32[2]", "expected '>'"),
    ("  %a = aten.neg.default(device(^cpu)) : f32[2]", "expected a device name"),
    (r'  %a = aten.neg.default( ^"\q") : f32[2]', "bad escape in string"),
    ('  %a = aten.neg.default(^"open) : f32[2]', "expected a string in double quotes"),
    ("  %a = aten.neg.default(%x)^", "expected ':'"),
    ("  %a = aten.neg.default(%x) : ^7", "expected a type"),
    ("  %a = aten.neg.default(%x) :  ^f31[2]", "unknown dtype 'f31': did you mean 'f32'"),
    ("  %a = aten.neg.default(%x) : ^strr", "unknown type 'strr': did you mean 'str'"),
    ("  %a = aten.neg.default(%x) : f32^[2", "'[' is never closed by ']'"),
    ("  %a = aten.neg.default(%x) : f32^[2)]", "'[' is never closed by ']'"),
    ("  %a = aten.neg.default(%x) : int^(s0", "'(' is never closed by ')'"),
    ("  %a = aten.neg.default(%x) : f32^[2,,3]", "a size is missing"),
    ("  %a = aten.neg.default(%x) : f32[2]^@7", "expected a device"),
    ("  %a, %b = aten.neg.default(%x) : f32[2]^", "expected ','"),
    ("  %a = aten.neg.default(%x) : f32[2] view( ^@w)", "not an operand of this op"),
    ("  %a = aten.neg.default(%x) : f32[2] views(-, ^@w)", "not an operand of this op"),
    ("  %a = aten.neg.default(%x) : f32[2] writes( ^@w)", "not an operand of this op"),
    ("  %a = aten.neg.default(%x) : f32[2] writes(%x -> ^%a)", "%a is defined twice"),
    ("  %a = aten.neg.default(%x) : f32[2] renews(%x -> ^)", "expected a value name such as %x"),
    ("  %a = aten.neg.default(%x) : f32[2] with  ^nograd", "unknown context 'nograd': did you mean 'no_grad'"),
    ("  %a = aten.neg.default(%x) : f32[2] with ^", "expected a context"),
    ("  %a = aten.neg.default(%x) : f32[2] in ^/b", "expected a module path"),
    ("  %a = aten.neg.default(%x) : f32[2] in a~^b", "expected a number"),
    ("  %a = aten.neg.default(%x) : f32[2] at ^model.py", "expected file:line"),
    ("  %a = aten.neg.default(%x) : f32[2] { ^3", "expected 'region'"),
    ("  %a = extern.f() : f32[2] { region ^3", "expected a region name"),
    ("  %a = extern.f() : f32[2] { region r (^x", "expected a value name such as %x"),
    ("  %a = extern.f() : f32[2] { region r (%p ^", "expected ':'"),
    ("  %a = extern.f() : f32[2] { region r (^%x : f32[2]", "%x is defined twice"),
    ("  %a = extern.f() : f32[2] { region r () { yield ^}", "expected an operand"),
    ("  input ^x : f32[2]", "expected a value name such as %x"),
    ("  input ^%x : f32[2]", "%x is defined twice"),
    ("  input %y^", "expected ':'"),
    ('  file ^"a.py"', "expected a file name"),
    ("  file a.py ^b", "expected a string in double quotes"),
    ("  state  ^@w : param f32[2]", "state 'w' is defined twice"),
    ("  state ^@v : param f32[2] names(@w)", "state 'w' is defined twice"),
    ("  state @v :  ^parm f32[2]", "unknown kind of state 'parm': did you mean 'param'"),
    ("  state @v : param f32[2] tensor(^x)", "expected a number"),
    ("  state @v : param f32[2] stages(^x)", "expected a number"),
    ("  state @v : param f32[2] share= ^replicat", "unknown share policy 'replicat': did you mean 'replicate'"),
    ("  stage^ 0 {", "a traced program has no stages"),
    ("  transfer ^%y : input -> 0", "%y is not defined: known: 'x'"),
    ("  transfer %x : ^here -> 0", "expected a number"),
    ("  transfer %x : 0 ^0", "expected '->'"),
    ("  transfer %x : 0 -> 1 ^sent", "unknown route 'sent': did you mean 'send'"),
    ("  transfer %x : 0 -> 3 relay^(1, 7)", "this transfer goes through stages (1, 2)"),
    ("  transfer %x : 0 -> 3 relay^", "this transfer goes through stages (1, 2)"),
    ("  transfer %x : 0 -> 1 send^(1)", "this transfer goes through stages ()"),
    ("  output ^%x", "expected '('"),
    ("  output (^%y)", "%y is not defined: known: 'x'"),
    ("  output (%x) ^output", "expected '}'"),
    ("  output (%x) } ^}", "text after the program's closing brace"),
    ("  ^}", "expected an op"),
    ("  ^?", "expected an op"),
    ("^", "expected an op"),
]


@pytest.mark.parametrize(("line", "what"), BAD_LINES)
def test_error_points_at_the_character(line: str, what: str) -> None:
    column = line.index("^") + 1
    bad = line.replace("^", "", 1)
    error = refusal(HEAD + bad)
    assert what in error.what.splitlines()[0]
    assert (error.file, error.line, error.column) == ("bad.ir", 4, column)
    _, shown, caret = str(error).splitlines()
    assert shown == "    " + bad
    assert caret == " " * (4 + column - 1) + "^"


@pytest.mark.parametrize(
    ("source", "line", "column", "what"),
    [
        ("", 1, 1, "expected 'program'"),
        ("\n\n  module", 3, 3, "expected 'program'"),
        ("program P", 1, 9, "expected a name such as"),
        ("program @P fase", 1, 12, "expected 'phase='"),
        ("program @P phase= tracd {", 1, 19, "unknown phase 'tracd': did you mean 'traced'"),
        ("program @P phase=traced stages=x", 1, 32, "expected a number"),
        ("program @P phase=traced\n", 1, 24, "expected '{'"),
        ("program @P phase=partitioned  stages=2 {\n output ()\n}", 1, 31, "2 stages are announced, 0 follow"),
        ("program @P phase=partitioned {\n  aten.f()", 2, 3, "expected 'stage', 'transfer' or 'output'"),
        ("program @P phase=partitioned {\n  stage x", 2, 9, "expected a number"),
        ("program @P phase=linked {\n  stage 0 {", 2, 11, "expected '('"),
        ("program @P phase=linked {\n  stage 0 () ()", 2, 14, "expected '->'"),
        ("program @P phase=linked {\n stage 0 () -> (%a) {\n }", 2, 17, "%a is not defined: there are none"),
        ("program @P phase=linked {\n stage 0 (%a) -> () {\n }", 2, 11, "%a is not defined: there are none"),
        ("program @P phase=partitioned {\n state @w : param f32[]\n stage 0 {\n  holds @w,  @v", 4, 14, "unknown state 'v': known: 'w'"),
        ("program @P phase=partitioned {\n stage 0 {\n", 3, 1, "expected an op"),
        ('program @P phase=traced {\n file a "x"\n file a "y"', 3, 7, "file 'a' is defined twice"),
    ],
)
def test_error_in_the_frame_of_a_program(source: str, line: int, column: int, what: str) -> None:
    error = refusal(source)
    assert what in error.what
    assert (error.line, error.column) == (line, column)


def test_caret_stands_under_the_character_behind_tabs() -> None:
    error = refusal(HEAD + "\t%a =\tfoo()")
    assert error.column == 7
    assert str(error).endswith("\n    \t%a =\tfoo()\n    \t    \t^")


@pytest.mark.parametrize(("opening", "closing"), ["[]", "()"])
def test_deep_nesting_is_refused(opening: str, closing: str) -> None:
    def source(depth: int) -> str:
        return HEAD + f"  extern.f({opening * depth}{closing * depth}) effect\n  output ()\n}}"

    parse(source(MAX_DEPTH))
    error = refusal(source(MAX_DEPTH + 1))
    assert (error.line, error.column) == (4, len("  extern.f(") + MAX_DEPTH + 1)
    assert f"nested more than {MAX_DEPTH} deep" in error.what
    assert "nested more than" in refusal(source(100_000)).what


def test_deep_regions_are_refused() -> None:
    source = HEAD + "  extern.f() {\n region r () {\n" * (MAX_DEPTH + 1)
    error = refusal(source)
    assert error.line == 4 + 2 * MAX_DEPTH
    assert f"nested more than {MAX_DEPTH} deep" in error.what


def test_endless_number_is_an_error_with_a_place() -> None:
    error = refusal(HEAD + f"  extern.f({'9' * 5000})")
    assert error.line == 4


def test_unknown_names_list_the_nearest_three() -> None:
    inputs = "".join(f"  input %hidden{i} : f32[2]\n" for i in range(9))
    error = refusal(f"program @P phase=traced {{\n{inputs}  output (%hiden1)\n}}")
    assert "%hiden1 is not defined: did you mean 'hidden1' or " in error.what


def test_regions_know_no_result_of_their_own_op() -> None:
    source = HEAD + "  %a = extern.f(<0>) : f32[2] {\n    region r () {\n      yield (%b,)\n    }\n  }\n  output ()\n}"
    assert (refusal(source).line, refusal(source).column) == (6, 14)
