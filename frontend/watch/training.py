"""Finds what follows `training`: which ops take the flag of their module, where Python chose by the flag, and
what a user's train() does.

While a module is traced, every read of `training` is noted. A read that is the flag of a call, as in
`F.dropout(x, p, self.training)`, makes that op follow its module; any other read is a choice that the trace
keeps. No op follows a flag that forward sets itself, as in `self.norm.eval()`. The grad modes that forward
asks for are noted too, because a trace only has those that differ from the mode it is made in.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType, NoneType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from stagecut.frontend.marks import FOLLOWS, GRAD, SAME
from stagecut.frontend.source import TORCH_DIR, shown, user_line
from stagecut.frontend.watch.attributes import attributes, copied, fingerprint
from stagecut.frontend.watch.forbidden import Untraceable
from stagecut.ir.blame import raise_ours
from stagecut.ir.ops import facts_of

_DIMENSIONS = "123d"
"""Endings of the names of some functions: `dropout2d`."""


def _flagged(home: Any) -> dict[Any, tuple[int, str]]:
    """The functions with a training flag in a module of torch's -> the position and the name of the flag
    among their arguments.
    """
    flags: dict[Any, tuple[int, str]] = {}
    for name, function in vars(home).items():
        position = facts_of(name.rstrip(_DIMENSIONS)).training.get("default")
        if position is None or not callable(function):
            continue
        if inspect.isfunction(function):
            names = [*inspect.signature(function).parameters]
        else:
            schema = getattr(torch.ops.aten, name).default._schema
            names = [argument.name for argument in schema.arguments]
        flags[function] = (position, names[position])
    return flags


_PYTHON_FLAGS, _BARE_FLAGS = _flagged(F), _flagged(torch)
_FLAGGED = _PYTHON_FLAGS | _BARE_FLAGS
_DROPOUTS = {
    function
    for function in _PYTHON_FLAGS
    if facts_of(function.__name__.rstrip(_DIMENSIONS)).off_is_operand
}
_BARE_DROPOUTS = {
    function for function in _BARE_FLAGS if facts_of(function.__name__).returns_operand
}
# the signature of these functions, because Python cannot see it
_BARE = inspect.signature(lambda input, p, train: None)


_GRAD_MODES = ("torch/autograd/grad_mode.py", "frontend/capture/rewrites.py")
"""Files with the context managers that switch the grad mode."""

_PLUMBING = (
    "nn/functional.py",
    "torch/overrides.py",
    "proxy_tensor.py",
    "non_strict_utils.py",
    "frontend/capture/rewrites.py",
    "frontend/capture/functions.py",
    "frontend/watch/forbidden.py",
)
"""Files whose frames lie between the call of such a function and us."""


_LOOK_ON = ("frontend/fold/reads.py", "frontend/watch/attribute_reads.py")
"""The files whose frames lie between code and the attributes that it reads."""


@dataclass(frozen=True)
class _Read:
    owner: int
    frame: tuple[int, CodeType]
    span: _Span
    place: str


class ModeReads(TorchFunctionMode):
    """Open while a module is traced. Afterwards `choices` has the reads of `training` that no op follows, by
    module path.

    `fixed` has the paths of the modules whose flag forward sets, with the line.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # by the module's dict: a tracer may put another object in front of a module
        self._paths: dict[int, list[str]] = {}
        for path, owner in module.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(vars(owner)), []).append(path)
        self._reads: list[_Read] = []
        self._set: dict[int, str] = {}
        self._trees: dict[str, _Tree | None] = {}
        self._grad: bool | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """While open, `training` is a property of all modules that notes its readers."""

        def read(owner: nn.Module) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                self._note(owner, _reader(sys._getframe(1)))
            return owner.__dict__["training"]

        def write(owner: nn.Module, mode: bool) -> None:
            owner.__dict__["training"] = mode
            if get_proxy_mode() is not None:
                self._set[id(vars(owner))] = shown(user_line())

        nn.Module.training = property(read, write)  # type: ignore[assignment]
        try:
            with self:
                yield
        finally:
            del nn.Module.training

    def _note(self, owner: nn.Module, frame: FrameType) -> None:
        torchs = frame.f_code.co_filename.startswith(TORCH_DIR)
        if id(vars(owner)) not in self._paths or (torchs and not _chooses(owner)):
            return
        span = _span(frame)
        choice = self._choices_in(frame.f_code.co_filename).get(span)
        if choice is not None and _is_the_same(choice, frame):
            return
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}, {type(owner).__name__}.{frame.f_code.co_name}"
        self._reads.append(
            _Read(id(vars(owner)), (id(frame), frame.f_code), span, place)
        )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            func(*args)
            self._switch_grad(args[0])
            return None
        if func is torch.Tensor.contiguous and get_proxy_mode() is not None:
            return _contiguous(func(*args, **kwargs), *args, **kwargs)
        if func not in _FLAGGED or get_proxy_mode() is None:
            return func(*args, **kwargs)
        if func in _DROPOUTS or func in _BARE_DROPOUTS:
            args, kwargs = _apart(func, args, kwargs)
        result = func(*args, **kwargs)
        caller = _caller()
        if not caller.f_code.co_filename.startswith(TORCH_DIR):
            _last_call().meta[FOLLOWS] = self._followed(func, caller)
        return result

    def _switch_grad(self, enabled: bool) -> None:
        """The switch in the trace says which grad mode forward asks for after it; None means the mode around
        the model.
        """
        manager, method = _grad_mode_manager(sys._getframe(2))
        if method in ("__exit__", "stop"):
            self._grad = getattr(manager, "_stagecut_grad", None)
        else:
            if manager is not None and not hasattr(manager, "_stagecut_grad"):
                manager._stagecut_grad = self._grad
            self._grad = enabled
        if (
            get_proxy_mode() is not None
            and last_node().target is torch._C._set_grad_enabled
        ):
            last_node().meta[GRAD] = self._grad

    def _followed(self, func: Any, caller: FrameType) -> tuple[str, ...]:
        """The call that `caller` is making takes the flag of a module: the paths of that module; () for a
        flag of its own.
        """
        span, frame = _span(caller), (id(caller), caller.f_code)
        # the newest first: another frame may have been where this one is
        reads = [read for read in reversed(self._reads) if read.frame == frame]
        tree = self._tree_of(caller.f_code.co_filename)
        if tree is not None:
            flag = _argument(tree.calls.get(span), *_FLAGGED[func])
            reads = [read for read in reads if read.span == flag]
        else:  # code without a source: the flag that is read last inside the call
            reads = [read for read in reads if _lies_in(read.span, span)]
        if not reads:
            return ()
        self._reads.remove(reads[0])
        return tuple(self._paths[reads[0].owner])

    def _tree_of(self, file: str) -> _Tree | None:
        """The calls and choices in a source file; None without a source."""
        if file not in self._trees:
            lines = linecache.getlines(file)
            self._trees[file] = _Tree.of("".join(lines)) if lines else None
        return self._trees[file]

    def _choices_in(self, file: str) -> dict[_Span, ast.IfExp]:
        tree = self._tree_of(file)
        return tree.choices if tree is not None else {}

    def state(self) -> bool | None:
        """The grad mode that forward has asked for; None for the mode around the model."""
        return self._grad

    def count(self) -> int:
        """How many reads there are that no op follows."""
        return len(self._reads)

    def since(self, count: int, path: str) -> list[tuple[str, str]]:
        """The reads beyond the first so many: the module of each, as a path in the module at `path`, and the
        place.
        """
        return [
            (inside.removeprefix(path), read.place)
            for read in self._reads[count:]
            for inside in self._paths[read.owner]
        ]

    def read_again(self, path: str, reads: Iterable[tuple[str, str]]) -> None:
        """The code of the module at `path` has made these reads."""
        owners = (
            {inside: owner for owner, paths in self._paths.items() for inside in paths}
            if reads
            else {}
        )
        for inside, place in reads:
            no_call = _span(sys._getframe())
            frame = (0, sys._getframe().f_code)
            self._reads.append(_Read(owners[path + inside], frame, no_call, place))

    @property
    def fixed(self) -> dict[str, str]:
        """Module path -> where forward sets its flag."""
        fixed: dict[str, str] = {}
        for owner, place in self._set.items():
            fixed |= dict.fromkeys(self._paths.get(owner, ()), place)
        return fixed

    @property
    def choices(self) -> dict[str, str]:
        """Module path -> where Python chose by its mode."""
        choices: dict[str, str] = {}
        for read in reversed(self._reads):
            choices |= dict.fromkeys(self._paths[read.owner], read.place)
        return choices


def _grad_mode_manager(frame: FrameType) -> tuple[Any, str]:
    """The context manager, and the method of it, through which forward switches the grad mode, seen from
    `frame` outwards; None for a function.
    """
    manager: Any = None
    method = ""
    while frame.f_back is not None:
        is_manager = frame.f_code.co_filename.endswith(_GRAD_MODES)
        if is_manager:
            manager, method = frame.f_locals["self"], frame.f_code.co_name
        elif manager is not None or not frame.f_code.co_filename.endswith(_PLUMBING):
            break
        frame = frame.f_back
    return manager, method


def _contiguous(
    result: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The result of `contiguous()`. An op of its own makes it where the trace had nothing to do and a dropout
    returned the tensor.

    A dropout makes a new tensor in a trace. A dropout that is off returns its operand, whose elements may lie
    anyhow.
    """
    if result is not tensor or args or kwargs or not is_of_dropout(tensor):
        return result
    return torch.ops.aten.contiguous.default(_itself(tensor))  # type: ignore[no-any-return]


def _apart(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The operands of a dropout. A dropout that is off gets an alias of its tensor: it returns the very
    tensor it is given, and the tracer would take its result for its operand.
    """
    signature = inspect.signature(func) if func in _DROPOUTS else _BARE
    call = signature.bind(*args, **kwargs)
    call.apply_defaults()
    if call.arguments[_FLAGGED[func][1]] or call.arguments.get("inplace"):
        return args, kwargs
    call.arguments["input"] = _itself(call.arguments["input"])
    return call.args, call.kwargs


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    """An alias of `tensor`. It is another tensor for the tracer, which thus does not take the results made of
    it for `tensor`; the stages have no op for it.
    """
    alias: torch.Tensor = torch.ops.aten.alias.default(tensor)
    last_node().meta[SAME] = True
    return alias


def is_of_dropout(tensor: torch.Tensor) -> bool:
    """True for the result of a dropout, for views of it, and for the results of in-place ops on those."""
    node = node_of(tensor)
    while isinstance(node, fx.Node) and node.op == "call_function":
        target = node.target
        if (
            isinstance(target, torch._ops.OpOverload)
            and facts_of(target._opname).off_is_operand
        ):
            return True
        if target is not operator.getitem and not _returns_alias(target):
            return False
        node = node.args[0] if node.args else None  # type: ignore[assignment]
    return False


def _returns_alias(target: Any) -> bool:
    """True for an op that returns its first argument, or a view of it."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    return schema.arguments[0].alias_info is not None


def _chooses(owner: nn.Module) -> bool:
    """True for a module of torch's own whose forward chooses by mode in Python, where the trace shows no
    flag.
    """
    if isinstance(
        owner,
        (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder),
    ):
        return True  # Python computes their dropout rate, and they take another path in eval mode
    return (
        isinstance(owner, _BatchNorm)
        and owner.momentum is None
        and not owner.__dict__["training"]
    )


_Span = tuple[int, int, int, int]


def _argument(call: ast.Call | None, position: int, name: str) -> _Span | None:
    """The place of an argument of a call in the source; None where the call does not give it by itself."""
    if call is None or any(
        isinstance(argument, ast.Starred) for argument in call.args[: position + 1]
    ):
        return None
    if position < len(call.args):
        return _place(call.args[position])
    for keyword in call.keywords:
        if keyword.arg == name:
            return _place(keyword.value)
    return None


def _lies_in(inner: _Span, outer: _Span) -> bool:
    """True for a span that begins and ends inside another one."""
    return outer[:2] <= inner[:2] and inner[2:] <= outer[2:]


@dataclass(frozen=True)
class _Tree:
    """All calls in a source file, and all `a if x.training else b` by where their flag stands."""

    calls: dict[_Span, ast.Call]
    choices: dict[_Span, ast.IfExp]

    @staticmethod
    def of(source: str) -> _Tree:
        try:
            nodes = [*ast.walk(ast.parse(source))]
        except (SyntaxError, ValueError, RecursionError):
            nodes = []
        choices = {
            _place(_unnegated(node.test)): node
            for node in nodes
            if isinstance(node, ast.IfExp)
        }
        return _Tree(
            {_place(node): node for node in nodes if isinstance(node, ast.Call)},
            choices,
        )


def _unnegated(test: ast.expr) -> ast.expr:
    return (
        test.operand
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        else test
    )


def _is_the_same(choice: ast.IfExp, frame: FrameType) -> bool:
    """True where both sides have one value, as in `0.0 if not self.training else self.rate` with a rate of
    0.0: nothing is chosen.
    """
    if not (_is_simple(choice.body) and _is_simple(choice.orelse)):
        return False
    try:
        body, orelse = _evaluated(choice.body, frame), _evaluated(choice.orelse, frame)
    except Exception:  # the side that is not taken may not be there
        return False
    return (
        type(body) is type(orelse)
        and isinstance(body, (bool, int, float, str, NoneType))
        and body == orelse
    )


def _is_simple(side: ast.expr) -> bool:
    """True for a constant, a name, or an attribute of a name."""
    return all(
        isinstance(node, (ast.Constant, ast.Name, ast.Attribute, ast.Load))
        for node in ast.walk(side)
    )


def _evaluated(side: ast.expr, frame: FrameType) -> Any:
    code = compile(ast.Expression(side), "<choice>", "eval")
    return eval(code, frame.f_globals, frame.f_locals)


def _place(node: ast.expr) -> _Span:
    return (
        node.lineno,
        node.col_offset,
        node.end_lineno or node.lineno,
        node.end_col_offset or 0,
    )


def _span(frame: FrameType) -> _Span:
    """First line and column, last line and column of the expression that a frame is running."""
    line, last, column, end = next(
        islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    )
    return line or frame.f_lineno, column or 0, last or frame.f_lineno, end or 0


def _reader(frame: FrameType) -> FrameType:
    """The frame that reads an attribute, from `frame` outwards: no frame of ours that looks on."""
    while frame.f_code.co_filename.endswith(_LOOK_ON) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _caller() -> FrameType:
    """The frame that called a function with a training flag."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(_PLUMBING) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def last_node() -> Any:
    """The newest node of the trace that is being made."""
    tracer: Any = get_proxy_mode()
    # `reversed` gives no iterator in torch 2.11
    return next(iter(reversed(tracer.tracer.graph.nodes)))


def _last_call() -> Any:
    """The newest node that makes a call; nodes that take a part of a result are skipped."""
    node = last_node()
    while node.target is operator.getitem:
        node = node.prev
    return node


def node_of(tensor: torch.Tensor) -> fx.Node | None:
    """The node that stands for a tensor in the trace that is being made, None for none."""
    tracer: Any = get_proxy_mode()
    slot = get_proxy_slot(tensor, tracer.tracer, None)
    return slot.proxy.node if slot is not None else None


def switches(
    module: nn.Module,
) -> tuple[dict[str, dict[bool, dict[str, bool]]], dict[str, str]]:
    """The effect of train() and eval() where a user's class has its own: module path -> mode -> the flags
    below that module. They are tried on a copy.

    The second part says where the methods stand that do more than set flags.
    """
    flags: dict[str, dict[bool, dict[str, bool]]] = {}
    places: dict[str, str] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        train = getattr(type(owner), "train", None)
        if (
            train is nn.Module.train
            or not inspect.isfunction(train)
            or train.__module__.startswith("torch.")
        ):
            continue
        try:
            flags[path] = _flags_after(owner)
        except Exception as error:
            raise_ours(error)
            places[path] = (
                f"{train.__code__.co_filename}:{train.__code__.co_firstlineno}, {type(owner).__name__}.train"
            )
    return flags, places


def _flags_after(owner: nn.Module) -> dict[bool, dict[str, bool]]:
    """The flags of all modules in `owner` after train(mode), for both modes. Raises when it changes anything
    else.
    """
    tensors = [*owner.parameters(), *owner.buffers()]
    twin = copied(owner, {id(tensor): _empty(tensor) for tensor in tensors})
    before = fingerprint_of(twin)
    found = [(part, part.training) for part in twin.modules()]
    flags = {}
    for mode in (True, False):
        for part, flag in found:
            part.training = flag
        twin.train(mode)
        if fingerprint_of(twin) != before:
            raise Untraceable("train() changes more than flags")
        flags[mode] = {
            path: part.training
            for path, part in twin.named_modules(remove_duplicate=False)
        }
    return flags


def fingerprint_of(module: nn.Module) -> Any:
    """A value that stays equal as long as nothing but the flags of `module` changes."""
    state = [
        (name, id(tensor), tensor._version, tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    values = {id(value): value for _, value in attributes(module)}
    # many modules have one and the same configuration
    prints = {address: fingerprint(value) for address, value in values.items()}
    return state, [(key, prints[id(value)]) for key, value in attributes(module)]


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    requires_grad = tensor.requires_grad
    # not empty_like, which classes of quantised weights may not know
    empty = torch.empty(
        tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=requires_grad
    )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad)
    return empty
