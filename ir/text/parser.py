"""text -> program. Reads what `stagecut.ir.text.printer` prints; errors point at file:line:column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NoReturn

from stagecut.ir.errors import ParseError, nearest
from stagecut.ir.graph import (
    CALL,
    CONTEXTS,
    KINDS,
    LINKED,
    PHASES,
    ROLES,
    ROUTES,
    SHARES,
    SPLIT,
    Block,
    Context,
    Effects,
    Frame,
    Function,
    Lane,
    Loc,
    Mode,
    Op,
    Place,
    Program,
    RegionRef,
    ResultForm,
    Scope,
    Stage,
    StateEntry,
    Token,
    Transfer,
    Value,
    scope_fqn,
)
from stagecut.ir.keywords import near_names
from stagecut.ir.text.groups import next_path
from stagecut.ir.text.printer import PART
from stagecut.ir.types import (
    DTYPES,
    SCALAR_KINDS,
    Batch,
    Dim,
    ScalarType,
    TensorType,
    Type,
)

MAX_DEPTH = 64
"""Deepest nesting of literals and regions that is read, and of modules in a scope or a name."""
MAX_CONTEXTS = 16
"""Greatest number of contexts that one op stands in. Python nests at most twenty blocks."""
MAX_SPAN = 100_000
"""Greatest number of modules in a row that one line stands for."""
MAX_SIZE = 4000
"""Length of the longest expression over sizes, in characters."""

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_NAME = re.compile(r"%([A-Za-z0-9_.]+)")
_FQN = re.compile(r"@([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)")
_PATH = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_NUMBER = re.compile(r"-?[0-9]{1,4000}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_INT = re.compile(r"[0-9]{1,4000}")
_PLACE = re.compile(r"[0-9]{1,4}|item|mean|sum")
_TERM = r"(?:[1-9][0-9]{0,18}\*)?b[0-9]{0,4}"
_SAMPLES = re.compile(rf"any|{_TERM}(?: \+ {_TERM}){{0,999}}")
_BRACKET = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[()\[\]{}\n]""")
"""A bracket, or a quoted string; brackets in a string do not count."""
_LOC = re.compile(r"([A-Za-z0-9_.]+):([0-9]{1,4000})")
_DEVICE = re.compile(r"@([a-z]+(?::[0-9]{1,4})?)")
_DEVICE_NAME = re.compile(r'"[a-z]+(?::[0-9]{1,4})?"')
_LITERALS = (str, int, float, complex, NoneType, Token)
_WORDS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "inf": float("inf"),
    "nan": float("nan"),
}


@near_names
def parse(source: str, file: str = "<string>") -> Program:
    """The program that `source` describes, as `text` and `Pipe.ir` print it. Raises ParseError at the first
    thing it cannot read; `file` is what the message calls the source. The invariants are not checked.
    """
    return _Parser(source, file).program()


def parse_literal(source: str, file: str = "<literal>") -> Any:
    """The nested literal that `source` describes. Raises ParseError for anything else."""
    return _Parser(source, file).literal()


class _Parser:
    def __init__(self, source: str, file: str) -> None:
        self._source, self._file, self._pos, self._depth = source, file, 0, 0
        self._values: dict[str, Value] = {}
        self._states: dict[str, StateEntry] = {}
        self._files: dict[str, str] = {}
        self._functions: dict[str, Function] = {}
        self._groups: dict[str, list[str]] = {}
        self._state_list: list[StateEntry] = []
        self._program = Program("")
        self._program.state = self._state_list
        self._ended = ""

    # --- scanning -------------------------------------------------------------------------------

    def _fail(self, what: str, pos: int | None = None) -> NoReturn:
        pos = self._pos if pos is None else pos
        start = self._source.rfind("\n", 0, pos) + 1
        end = self._source.find("\n", pos)
        line = self._source[start : end if end >= 0 else None]
        number = self._source.count("\n", 0, pos) + 1
        raise ParseError(
            what, file=self._file, line=number, column=pos - start + 1, source=line
        )

    def _skip(self, pattern: re.Pattern[str] = _SPACE) -> None:
        match = pattern.match(self._source, self._pos)
        if match:
            self._pos = match.end()

    def _next_position(self) -> int:
        self._skip()
        return self._pos

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self._skip()
        match = pattern.match(self._source, self._pos)
        if match:
            self._pos = match.end()
        return match

    def _need(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        match = self._take(pattern)
        if not match:
            self._fail(f"expected {what}")
        return match

    def _accept(self, token: str) -> bool:
        self._skip()
        if not self._source.startswith(token, self._pos):
            return False
        end = self._pos + len(token)
        if (
            token[-1].isalnum()
            and end < len(self._source)
            and (self._source[end].isalnum() or self._source[end] in "_.")
        ):
            return False
        self._pos = end
        return True

    def _expect(self, token: str) -> None:
        if not self._accept(token):
            self._fail(f"expected '{token}'")

    def _int(self) -> int:
        return int(self._need(_INT, "a number")[0])

    def _string(self) -> str:
        start = self._next_position()
        raw = self._need(_STRING, "a string in double quotes")[0]
        try:
            return str(json.loads(raw))
        except (ValueError, RecursionError):
            self._fail("bad escape in string", start)

    def _comma_list(self, read: Callable[[], Any]) -> list[Any]:
        """One part or more with commas between them, each read by `read`."""
        parts = [read()]
        while self._accept(","):
            parts.append(read())
        return parts

    def _list(self, read: Callable[[], Any], close: str = ")") -> list[Any]:
        """The parts up to `close`, with commas between them, each read by `read`."""
        parts: list[Any] = []
        while not self._accept(close):
            if parts:
                self._expect(",")
                if self._accept(close):
                    break
            parts.append(read())
        return parts

    # --- program --------------------------------------------------------------------------------

    def program(self) -> Program:
        program = self._program
        self._skip(_BLANK)
        self._expect("program")
        program.name = self._fqn()
        self._expect("phase=")
        program.phase = self._word_among(PHASES, "phase")
        start = self._next_position()
        if self._accept(PART):
            self._fail(
                "this is a part of a program, as --only shows it, and only a whole one can be read: write it "
                "without --only",
                start,
            )
        count = self._int() if self._accept("stages=") else None
        self._expect("{")
        while True:
            self._skip(_BLANK)
            if self._accept("output"):
                break
            self._statement()
        program.set_outputs(list(self._tuple()))
        self._skip(_BLANK)
        self._expect("}")
        self._skip(_BLANK)
        if self._pos < len(self._source):
            self._fail("text after the program's closing brace")
        if count is not None and count != len(program.stages):
            self._fail(
                f"{count} stages are announced, {len(program.stages)} follow", start
            )
        return program

    def literal(self) -> Any:
        tree = self._tree()
        if self._next_position() < len(self._source):
            self._fail("text after the literal")
        return tree

    def _statement(self) -> None:
        program = self._program
        if self._accept("file"):
            self._file_name()
        elif self._accept("input"):
            name = self._fresh()
            self._expect(":")
            self._define(name, program.add_input(self._type(), name))
        elif self._state_line():
            pass
        elif self._accept("function"):
            self._function()
        elif self._accept("lane"):
            self._lane()
        elif self._accept("stage"):
            self._stage()
        elif self._accept("transfer"):
            self._transfer()
        elif program.phase == "differentiated" and self._accept("cotangent"):
            self._cotangent()
        elif program.phase == "differentiated" and self._accept("backward_input"):
            self._backward("backward_input")
        elif program.phase == "differentiated" and self._accept("backward_weight"):
            self._backward("backward_weight")
        elif program.phase == "traced":
            program.ops.append(self._op())
        else:
            self._fail("expected 'stage', 'transfer' or 'output'")

    def _file_name(self) -> None:
        short = self._need(_LOC_FILE, "a file name")
        if short[0] in self._files:
            self._fail(f"file '{short[0]}' is defined twice", short.start())
        self._files[short[0]] = self._string()

    def _state(self) -> None:
        start = self._next_position()
        names = [self._state_name()]
        self._expect(":")
        kind = self._word_among(KINDS, "kind of state")
        entry = StateEntry(tuple(names), kind, self._type())
        if self._accept("names"):
            self._expect("(")
            names += self._list(self._state_name)
        entry.names = tuple(names)
        entry.transient = self._transient(entry)
        unique = -1 - len(self._state_list)
        entry.tensor = self._parenthesised_int("tensor", unique)
        entry.storage = self._parenthesised_int("storage", unique)
        entry.stages = self._stages()
        if self._accept("share="):
            entry.share = self._word_among(SHARES, "share policy")
        self._add_state(entry, start)

    def _add_state(self, entry: StateEntry, start: int) -> None:
        for name in entry.names:
            if name in self._states:
                self._fail(f"state '{name}' is defined twice", start)
            self._states[name] = entry
        self._state_list.append(entry)

    def _state_line(self) -> bool:
        """True when the line defines state, which is read then."""
        if self._accept("state"):
            self._state()
        elif self._accept("states"):
            self._states_of()
        else:
            return False
        return True

    def _states_of(self) -> None:
        """The state that a function reads, of the module at a path, or of modules in a row."""
        start = self._next_position()
        paths = self._paths()
        self._expect("of")
        function = self._function_name()
        stages = self._stages()
        for path in paths:
            if path in self._groups:
                self._fail(f"the state of '{path}' is defined twice", start)
            self._groups[path] = []
            for wanted in function.state:
                name = f"{path}.{wanted.name}"
                self._check_path(name, start)
                unique = -1 - len(self._state_list)
                entry = StateEntry(
                    (name,),
                    wanted.kind,
                    wanted.type,
                    frozenset((name,) if wanted.transient else ()),
                    unique,
                    unique,
                    stages,
                )
                self._add_state(entry, start)
                self._groups[path].append(name)

    def _stages(self) -> tuple[int, ...]:
        """The stages that a clause lists, none without one."""
        if not self._accept("stages"):
            return ()
        self._expect("(")
        return tuple(self._list(self._int))

    def _paths(self) -> list[str]:
        """A path, or those from `@layers.0-7`."""
        start = self._next_position()
        paths = [self._fqn()]
        if not self._source.startswith("-", self._pos):
            return paths
        self._pos += 1
        last = self._int()
        while paths[-1].rpartition(".")[2] != str(last):
            following = next_path(paths[-1])
            if following is None or len(paths) > MAX_SPAN:
                self._fail("not the paths of modules in a row", start)
            paths.append(following)
        return paths

    def _function(self) -> None:
        """A function: names in it are its own."""
        name = self._need(_PATH, "a name")
        if name[0] in self._functions:
            self._fail(f"function '{name[0]}' is defined twice", name.start())
        outer = self._values, self._states, self._state_list, self._groups
        self._values, self._states, self._state_list, self._groups = {}, {}, [], {}
        self._expect("(")
        function = Function(name[0], self._list(self._param))
        self._expect("{")
        while True:
            self._skip(_BLANK)
            if not self._state_line():
                break
        function.state = self._state_list
        function.ops = self._ops("yield")
        function.set_outputs(self._tree())
        self._skip(_BLANK)
        self._expect("}")
        self._values, self._states, self._state_list, self._groups = outer
        self._functions[name[0]] = function

    def _function_name(self) -> Function:
        name = self._need(_PATH, "the name of a function")
        if name[0] not in self._functions:
            self._fail(
                f"unknown function '{name[0]}': {nearest(name[0], self._functions)}",
                name.start(),
            )
        return self._functions[name[0]]

    def _lane(self) -> None:
        lane = Lane(self._value())
        if self._accept("->"):
            self._expect("output")
            lane.left = self._int()
        lane.stages = self._stages()
        self._program.lanes.append(lane)

    def _word_among(self, words: tuple[str, ...], what: str) -> str:
        word = self._need(_WORD, f"a {what}")
        if word[0] not in words:
            self._fail(
                f"unknown {what} '{word[0]}': {nearest(word[0], words)}", word.start()
            )
        return word[0]

    def _transient(self, entry: StateEntry) -> frozenset[str]:
        if not self._accept("nonpersistent"):
            return frozenset()
        if not self._accept("("):
            return frozenset(entry.names)
        start = self._pos
        names = frozenset(self._list(self._fqn))
        if not names <= set(entry.names):
            self._fail("not a name of this entry", start)
        return names

    def _parenthesised_int(self, word: str, default: int) -> int:
        if not self._accept(word):
            return default
        self._expect("(")
        number = int(self._need(re.compile(r"-?[0-9]{1,4000}"), "a number")[0])
        self._expect(")")
        return number

    def _stage(self) -> None:
        program = self._program
        if program.phase == "traced":
            self._fail("a traced program has no stages")
        stage = Stage(self._int())
        inputs: list[Value] = []
        outputs: list[tuple[str, int]] = []
        if program.phase in LINKED or self._source.startswith(
            "(", self._next_position()
        ):
            self._expect("(")
            inputs = self._list(self._value)
            self._expect("->")
            self._expect("(")
            outputs = self._list(self._value_name)
        self._expect("{")
        program.stages.append(stage)
        self._skip(_BLANK)
        if self._accept("holds"):
            self._holds(stage)
        stage.ops = self._stage_ops()
        if self._ended == "saves":
            stage.saved = self._comma_list(self._value)
            self._skip(_BLANK)
            self._expect("}")
        stage.inputs = inputs
        stage.set_outputs([self._resolve(*name) for name in outputs])

    def _stage_ops(self) -> list[Op]:
        if self._program.phase == "differentiated":
            return self._ops("}", "saves")
        return self._ops("}")

    def _holds(self, stage: Stage) -> None:
        while True:
            start = self._next_position()
            for path in self._paths():
                for name in self._groups.get(path, [path]):
                    if name not in self._states:
                        self._fail(
                            f"unknown state '{name}': {nearest(name, self._states)}",
                            start,
                        )
                    entry = self._states[name]
                    stage.state[entry] = (*stage.state.get(entry, ()), name)
            if not self._accept(","):
                return

    def _transfer(self) -> None:
        value = self._value()
        self._expect(":")
        source = None if self._accept("input") else self._int()
        self._expect("->")
        transfer = Transfer(value, source, self._int())
        if _WORD.match(self._source, self._next_position()):
            transfer.route = self._word_among(ROUTES, "route")
            start = self._next_position()
            if transfer.route == "recompute":
                self._expect("(")
                transfer.recomputed = self._value()
                self._expect(")")
            via = tuple(self._list(self._int)) if self._accept("(") else ()
            if len(via) != transfer.via_count or via != transfer.via:
                self._fail(f"this transfer goes through stages {_via(transfer)}", start)
        if source is not None and source > transfer.target:
            self._program.backward_transfers.append(transfer)
        else:
            self._program.transfers.append(transfer)

    def _cotangent(self) -> None:
        name = self._fresh()
        self._expect(":")
        value = Value(self._type(), name)
        self._define(name, value)
        self._gradients([value])
        self._program.cotangents.append(value)

    def _backward(self, role: str) -> None:
        """A block of the backward of a stage that stands before it in the text."""
        start = self._next_position()
        number = self._int()
        if number >= len(self._program.stages):
            self._fail(f"there is no stage {number} before this", start)
        stage = self._program.stages[number]
        if len(stage.backward) != ROLES.index(role) - 1:
            self._fail(f"not the place of a {role} of stage {number}", start)
        self._expect("(")
        block = Block(role, self._list(self._value))
        self._expect("->")
        self._expect("(")
        outputs = self._list(self._value_name)
        self._expect("{")
        block.ops = self._ops("}")
        block.set_outputs([self._resolve(*name) for name in outputs])
        stage.backward.append(block)

    def _gradients(self, values: Sequence[Value]) -> None:
        """The clause that says what each of some values is the gradient of, where there is one."""
        if not self._accept("gradient"):
            return
        self._expect("(")
        start = self._next_position()
        of = self._list(lambda: None if self._accept("-") else self._value())
        if len(of) != len(values):
            self._fail(
                f"{len(of)} gradients for {len(values)} values",
                start,
            )
        for value, whose in zip(values, of, strict=True):
            value.gradient_of = whose

    # --- ops ------------------------------------------------------------------------------------

    def _ops(self, *ends: str) -> list[Op]:
        """The ops of a block, up to one of `ends`, which is read too and is `_ended` then."""
        ops: list[Op] = []
        while True:
            self._skip(_BLANK)
            for end in ends:
                if self._accept(end):
                    self._ended = end
                    return ops
            ops.append(self._op())

    def _op(self) -> Op:
        if self._accept("split"):
            return self._clauses(SPLIT, (), {}, [], [])
        names: list[str] = []
        while self._source.startswith("%", self._pos):
            names.append(self._fresh(names))
            if not self._accept(","):
                self._expect("=")
                break
            if not self._source.startswith("%", self._next_position()):
                self._fail("expected a value name such as %x")
        start = self._next_position()
        function = self._function_name() if self._accept("call") else None
        target = CALL if function is not None else self._target()
        self._expect("(")
        args, kwargs = self._arguments()
        if function is not None:
            args, kwargs = ([*args],), {}
        types: list[Type] = []
        if names:
            self._expect(":")
            types.append(self._type())
            while len(types) < len(names):
                self._expect(",")
                types.append(self._type())
        op = self._clauses(target, args, kwargs, names, types)
        if function is not None:
            op.regions = (function,)
            op.set_operands((*args, self._state_of(op, function, start)), {})
        return op

    def _state_of(self, op: Op, function: Function, start: int) -> list[Value]:
        """The state that a call reads: it stands at the path of its module."""
        path = scope_fqn(op.scope)
        names = [f"{path}.{entry.name}" for entry in function.state]
        for name in names:
            if name not in self._states:
                self._fail(f"function '{function.name}' reads '{name}' here", start)
        return [self._states[name].value for name in names]

    def _target(self) -> str:
        start = self._next_position()
        target = self._need(_DOTTED, "an op")[0]
        if target == "module" and self._accept("."):
            return f"module.{self._string()}"
        if "." not in target:
            self._fail(
                f"expected an op such as aten.add.Tensor, found '{target}'", start
            )
        return target

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}

        def read() -> None:
            self._skip()
            match = re.compile(r"([A-Za-z_]\w*)=").match(self._source, self._pos)
            if match and match[1] in kwargs:
                self._fail(f"keyword '{match[1]}' is given twice")
            if match:
                self._pos = match.end()
                kwargs[match[1]] = self._tree()
            elif kwargs:
                self._fail("positional operand after a keyword")
            else:
                args.append(self._tree())

        self._list(read)
        return tuple(args), kwargs

    def _clauses(
        self,
        target: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: list[str],
        types: list[Type],
    ) -> Op:
        op = Op(target, args, kwargs)
        for name, value_type in zip(names, types, strict=True):
            self._define(name, op.add_result(value_type, name))
        self._gradients(op.results)
        if self._accept("form"):
            self._expect("(")
            op.form = _form(self._tree())
            self._expect(")")
        views = self._views(op)
        writes: tuple[Value, ...] = ()
        if self._accept("writes"):
            self._expect("(")
            writes = tuple(self._list(lambda: self._write(op, must_be_operand=True)))
        if self._accept("renews"):
            self._expect("(")
            self._list(lambda: self._write(op, must_be_operand=False))
        random = self._accept("random")
        op.effects = Effects(writes, views, random, self._accept("effect"))
        context = self._contexts() if self._accept("with") else ()
        scope = self._scope() if self._accept("in") else ()
        op.place = Place(scope, context, self._loc() if self._accept("at") else None)
        if self._accept("{"):
            op.regions = tuple(self._regions())
        return op

    def _loc(self) -> Loc:
        loc = self._need(_LOC, "file:line")
        return Loc(self._files.get(loc[1], loc[1]), int(loc[2]))

    def _views(self, op: Op) -> tuple[Value | None, ...]:
        if self._accept("views"):
            self._expect("(")
            return tuple(
                self._list(lambda: None if self._accept("-") else self._operand(op))
            )
        if self._accept("view"):
            self._expect("(")
            viewed = self._operand(op)
            self._expect(")")
            return (viewed,) * len(op.results)
        return ()

    def _operand(self, op: Op) -> Value:
        start = self._next_position()
        value = self._value()
        if value not in op.operands:
            self._fail("not an operand of this op", start)
        return value

    def _write(self, op: Op, *, must_be_operand: bool) -> Value:
        old = self._operand(op) if must_be_operand else self._value()
        if self._accept("->"):
            name = self._fresh()
            new = op.add_version(old, name)
            if self._accept(":"):
                new.type = self._type()
            self._define(name, new)
        return old

    def _contexts(self) -> tuple[Context, ...]:
        contexts = []
        while True:
            kind = self._word_among(CONTEXTS, "context")
            start = self._next_position()
            args = tuple(self._list(self._tree)) if self._accept("(") else ()
            if not _fits_context(kind, args):
                self._fail(f"'{kind}' does not take these arguments", start)
            contexts.append(Context(kind, args))
            if len(contexts) > MAX_CONTEXTS:
                self._fail(f"more than {MAX_CONTEXTS} contexts")
            if not self._accept(","):
                return tuple(contexts)

    def _scope(self) -> Scope:
        frames: list[Frame] = []
        start = self._next_position()
        while True:
            name = (
                self._string()
                if self._source.startswith('"', self._pos)
                else self._need(_PATH, "a module path")[0]
            )
            call = (
                self._int()
                if self._source.startswith("~", self._pos) and self._accept("~")
                else 0
            )
            frames.append(Frame(name, call))
            if not self._source.startswith("/", self._pos):
                self._check_path(".".join(frame.name for frame in frames), start)
                return tuple(frames)
            self._pos += 1

    def _check_path(self, path: str, start: int) -> None:
        parts = path.split(".")
        if "" in parts:
            self._fail("a module has a name, and so has a tensor", start)
        if len(parts) > MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} deep", start)

    def _regions(self) -> list[Block]:
        self._enter()
        regions: list[Block] = []
        while True:
            self._skip(_BLANK)
            if self._accept("}"):
                self._depth -= 1
                return regions
            self._expect("region")
            regions.append(self._region())

    def _region(self) -> Block:
        name = self._need(_WORD, "a region name")[0]
        self._expect("(")
        inputs = self._list(self._param)
        self._expect("{")
        region = Block(name, inputs, self._ops("yield"), self._tree())
        self._skip(_BLANK)
        self._expect("}")
        return region

    def _param(self) -> Value:
        name = self._fresh()
        self._expect(":")
        value = Value(self._type(), name)
        self._define(name, value)
        return value

    # --- names, literals, types -------------------------------------------------------------------

    def _fresh(self, beside: Sequence[str] = ()) -> str:
        start = self._next_position()
        name = self._need(_NAME, "a value name such as %x")[1]
        if name in self._values or name in beside:
            self._fail(f"%{name} is defined twice", start)
        return name

    def _define(self, name: str, value: Value) -> None:
        self._values[name] = value
        value.hint = name.removeprefix(".")  # the mark of a value inside of a function

    def _value_name(self) -> tuple[str, int]:
        start = self._next_position()
        if self._source.startswith("@", start):
            return "@" + self._fqn(), start
        return "%" + self._need(_NAME, "a value")[1], start

    def _value(self) -> Value:
        return self._resolve(*self._value_name())

    def _resolve(self, name: str, start: int) -> Value:
        if name[0] == "@":
            if name[1:] not in self._states:
                self._fail(
                    f"unknown state '{name[1:]}': {nearest(name[1:], self._states)}",
                    start,
                )
            return self._states[name[1:]].value
        if name[1:] not in self._values:
            self._fail(
                f"{name} is not defined: {nearest(name[1:], self._values)}", start
            )
        return self._values[name[1:]]

    def _state_name(self) -> str:
        start = self._next_position()
        name = self._fqn()
        self._check_path(name, start)
        return name

    def _fqn(self) -> str:
        self._skip()
        if self._source.startswith('@"', self._pos):
            self._pos += 1
            return self._string()
        return self._need(_FQN, "a name such as @layers.0.weight")[1]

    def _enter(self) -> None:
        self._skip()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} deep")

    def _tree(self) -> Any:
        self._enter()
        tree = self._tree_at_depth()
        self._depth -= 1
        return tree

    def _tree_at_depth(self) -> Any:
        char = self._source[self._pos : self._pos + 1]
        if char in "%@" and char:
            return self._value()
        if char == '"':
            return self._string()
        if char == "(":
            return self._tuple()
        if char == "[":
            self._pos += 1
            return self._list(self._tree, "]")
        if char == "{":
            self._pos += 1
            return dict(self._list(self._pair, "}"))
        if char == "<":
            self._pos += 1
            ref = RegionRef(self._int())
            self._expect(">")
            return ref
        if self._accept("..."):
            return ...
        if self._accept("-inf"):
            return float("-inf")
        number = self._take(_NUMBER)
        if number:
            return (
                int(number[0])
                if number[0].lstrip("-").isdecimal()
                else float(number[0])
            )
        return self._word()

    def _pair(self) -> tuple[Any, Any]:
        start = self._next_position()
        key = self._tree()
        if not isinstance(key, _LITERALS):
            self._fail("a key is a string, a number or another plain literal", start)
        self._expect(":")
        return key, self._tree()

    def _tuple(self) -> tuple[Any, ...]:
        self._expect("(")
        return tuple(self._list(self._tree))

    def _word(self) -> Any:
        start = self._next_position()
        word = self._need(_DOTTED, "an operand")[0]
        if word in _WORDS:
            return _WORDS[word]
        if word.startswith("torch."):
            return Token(word)
        if word == "device" and self._accept("("):
            inner = self._need(_DEVICE_NAME, "a device name")[0]
            self._expect(")")
            return Token(f"device({inner})")
        if word in _CALLED and self._accept("("):
            arguments = self._list(self._tree)
            try:
                return _CALLED[word](*arguments)
            except (TypeError, ValueError):
                self._fail(f"bad {word}(...)", start)
        self._fail(f"unknown literal '{word}'", start)

    def _type(self) -> Type:
        start = self._next_position()
        word = self._need(_WORD, "a type")[0]
        if self._source.startswith("[", self._pos):
            return self._tensor_type(word, start)
        if word not in SCALAR_KINDS:
            self._fail(
                f"unknown type '{word}': {nearest(word, [*SCALAR_KINDS, *DTYPES])}",
                start,
            )
        expr = (
            self._balanced("(", ")")
            if self._source.startswith("(", self._pos)
            else None
        )
        return ScalarType(word, expr)

    def _tensor_type(self, dtype: str, start: int) -> TensorType:
        if dtype not in DTYPES:
            self._fail(f"unknown dtype '{dtype}': {nearest(dtype, DTYPES)}", start)
        shape = self._dims("[", "]")
        strides = (
            self._dims("{", "}") if self._source.startswith("{", self._pos) else None
        )
        device = "cpu"
        if self._source.startswith("@", self._pos):
            device = self._need(_DEVICE, "a device")[1]
        grad = self._accept("grad")
        return TensorType(dtype, shape, strides, device, grad, self._batch(shape))

    def _batch(self, shape: tuple[Dim, ...]) -> Batch | None:
        if not self._accept("batch("):
            return None
        start = self._next_position()
        place = self._need(_PLACE, "a dim, or one of item, mean and sum")[0]
        dim = int(place) if place.isdecimal() else place
        if isinstance(dim, int) and dim >= len(shape):
            self._fail(f"the tensor has {len(shape)} dims", start)
        size = "b"
        if self._accept(":"):
            size = self._need(_SAMPLES, "a size such as 4*b, or b + b1")[0]
        self._expect(")")
        return Batch(dim, size)

    def _balanced(self, opening: str, closing: str) -> str:
        start, depth = self._pos, 0
        for match in _BRACKET.finditer(self._source, start):
            char = match[0]
            depth += (char in "([{") - (char in ")]}")
            if char == "\n" or (depth == 0 and char != closing):
                break
            if depth == 0:
                self._pos = match.end()
                return self._source[start + 1 : match.start()]
        self._fail(f"'{opening}' is never closed by '{closing}'", start)

    def _dims(self, opening: str, closing: str) -> tuple[Dim, ...]:
        start = self._pos
        inner = self._balanced(opening, closing)
        parts, depth, current = [], 0, ""
        for char in inner:
            depth += (char in "([") - (char in ")]")
            if char == "," and depth == 0:
                parts.append(current)
                current = ""
            else:
                current += char
        if current.strip():
            parts.append(current)
        sizes = [part.strip() for part in parts]
        if "" in sizes:
            self._fail("a size is missing", start)
        for size in sizes:
            if not is_expression(size):
                self._fail(
                    f"'{size[:40]}' is no size: a number, or an expression over sizes such as 2*s0",
                    start,
                )
        return tuple(int(size) if _INT.fullmatch(size) else size for size in sizes)


def _via(transfer: Transfer) -> str:
    """The stages between the ends of a transfer, for a message."""
    if transfer.via_count < 100:
        return str(transfer.via)
    return f"between, all {transfer.via_count}"


def _form(tree: Any) -> ResultForm:
    """The form that is written as a tree: `"tensors"`, `("tensors", ...)`, or result numbers."""
    if tree == "tensors":
        return ResultForm(rest=())
    if isinstance(tree, tuple) and tree[:1] == ("tensors",):
        return ResultForm(rest=tree[1:])
    return ResultForm(tree)


def _mode(
    captured: Any, training: Any = True, evaluating: Any = False, *others: Any
) -> Mode:
    """The mode with these parts. Raises TypeError for parts that no mode can have."""
    fits = (
        isinstance(captured, bool)
        and isinstance(training, _LITERALS)
        and isinstance(evaluating, _LITERALS)
        and all(isinstance(path, str) for path in others)
    )
    if not fits:
        raise TypeError
    return Mode(captured, training, evaluating, others)


_CALLED: dict[str, Callable[..., Any]] = {
    "slice": slice,
    "complex": complex,
    "mode": _mode,
}
"""Literals that are written as a call."""


def is_expression(text: str) -> bool:
    """True for a number, and for a text that may be an expression over sizes, with nothing but names,
    numbers, operators and calls.
    """
    return len(text) <= MAX_SIZE and _SIZE.fullmatch(text) is not None


def _fits_context(kind: str, args: tuple[Any, ...]) -> bool:
    """True for the arguments that a context of that kind has."""
    if kind == "checkpoint":
        return [*map(type, args)] == [int, bool]
    if kind == "transform":
        return [*map(type, args)] == [int]
    if kind == "autocast":
        return 1 <= len(args) <= 4 and _fits_autocast(*args)
    return not args


def _fits_autocast(device: Any, *options: Any) -> bool:
    return (
        isinstance(device, str)
        and device.isidentifier()
        and all(isinstance(option, (bool, NoneType, Token)) for option in options)
    )


_SIZE = re.compile(
    r"(?:[ ()+\-*/%,<>=!&|~]|(?<![A-Za-z0-9_.])(?:[A-Za-z][A-Za-z0-9_]*|[0-9]+(?:\.[0-9]+)?))+"
)
_LOC_FILE = re.compile(r"[A-Za-z0-9_.]+")
