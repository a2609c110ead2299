"""The calling convention of a model: user arguments -> the flat inputs of a program, flat outputs -> the
model's structure. Needs torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)

from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import InputError, nearest
from stagecut.ir.graph import Value
from stagecut.ir.run.given import (
    Outcome,
    children,
    holds_given,
    opened_arguments,
    other_attributes,
    put_together,
    read_spec,
    text_of,
    written_spec,
)
from stagecut.ir.run.objects import opened
from stagecut.ir.run.shown import shown_value
from stagecut.ir.run.storage import SHORT
from stagecut.ir.sizes import expression
from stagecut.ir.types import DTYPES, FLOATS, NONE, ScalarType, TensorType

Ranges = Mapping[str, tuple[int | None, int | None]]
"""Symbolic size -> its least and its greatest value, None for no bound."""


_AGAIN = "trace again with such an example input"


NO_NAMES: Mapping[str, Any] = MappingProxyType({})

_SPECS = ("in_spec", "out_spec")

ABSENT = inspect.Parameter.empty
"""Stands for the default of a parameter that has none."""


@dataclass
class CallSpec:
    """The calling convention a program was traced with.

    positional and keywords are the argument names of the example call; parameters are all names the model's
    forward takes by position, with their defaults where they have one; ranges are the least and the greatest
    value of each symbolic size, None for no bound; written is the signature of the model's forward, None
    where only the names are known; needs_arguments is True when the result holds objects that forward was
    given, or forward changes them.
    """

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    parameters: dict[str, Any]
    in_spec: TreeSpec
    out_spec: TreeSpec
    ranges: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    written: inspect.Signature | None = field(default=None, compare=False)
    needs_arguments: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # not a cached_property, whose lock torch.compile cannot trace
        self.needs_arguments = holds_given(self.out_spec)

    def __getstate__(self) -> dict[str, Any]:
        specs = {name: written_spec(getattr(self, name)) for name in _SPECS}
        return {**vars(self), **specs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        specs = {name: read_spec(state[name]) for name in _SPECS}
        vars(self).update(state, **specs)

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the model's forward, without annotations. Where only the names are known, what
        cannot be given by position is keyword-only.
        """
        if self.written is not None:
            return self.written
        parameters: list[inspect.Parameter] = []
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = dict.fromkeys([*self.parameters, *self.positional, *self.keywords])
        for name in names:
            if not name.isidentifier() or iskeyword(name):
                continue
            default = self.parameters.get(name, ABSENT)
            after_default = parameters and parameters[-1].default is not ABSENT
            if default is ABSENT and (after_default or name in self.keywords):
                kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, kind, default=default))
        return inspect.Signature(parameters)

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The flat inputs of a call. Raises InputError when the call does not fit the traced one."""
        args, ordered = self.arranged(args, kwargs)
        flat, spec = tree_flatten(opened_arguments(without_sizes((args, ordered))))
        if spec != self.in_spec:
            raise InputError(
                "the arguments are nested otherwise than in the example call: "
                f"{self._difference(args, ordered)}",
                hint=(
                    "call with the same structure, or trace again with these arguments as mb_args / "
                    "mb_kwargs"
                ),
            )
        for name, traced, actual in other_attributes(self.in_spec, spec):
            raise InputError(
                f"the attribute '{name}' of an argument is {actual!r:.60}, the program was traced with "
                f"{traced!r:.60}",
                hint=_AGAIN,
            )
        return flat

    def arranged(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call by position and by name, as the example call gave them."""
        args, kwargs = tuple(args), dict(kwargs)
        if len(args) != len(self.positional) or set(kwargs) != set(self.keywords):
            args, kwargs = self._rebind(args, kwargs)
        return args, {name: kwargs[name] for name in self.keywords}

    @property
    def changes(self) -> bool:
        """True when forward changes objects or containers that it is given: its last outputs are what it
        leaves there.
        """
        return self.out_spec.type is Outcome

    @property
    def result_leaves(self) -> int:
        """The number of flat outputs that are in the result; the others are what forward leaves in what it is
        given.
        """
        result = children(self.out_spec)[0] if self.changes else self.out_spec
        return result.num_leaves

    def unflatten(
        self,
        outputs: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = NO_NAMES,
    ) -> Any:
        """The model's own output structure around the flat outputs. What forward changed in the objects that
        it was given is changed in those of this call.
        """
        if not self.needs_arguments:
            return tree_unflatten(list(outputs), self.out_spec)
        return put_together(outputs, self.out_spec, self.arranged(args, kwargs))

    def result_alone(self, outputs: Sequence[Any]) -> Any:
        """The model's own output structure where there is no call: a `Given` stands for what forward returns
        of its arguments, and what it leaves in them is left out.
        """
        tree = tree_unflatten(list(outputs), self.out_spec)
        return tree.result if isinstance(tree, Outcome) else tree

    def output_names(self) -> tuple[str, ...]:
        """The place of each output in the model's result: `logits`, `hidden[1]`. Empty where that is not
        known, or where the result is a bare tensor.
        """
        try:
            leaves = [torch.empty(0)] * self.out_spec.num_leaves
            tree = tree_unflatten(leaves, self.out_spec)
            if isinstance(tree, Outcome):
                return (*_leaf_names(tree.result), *self._names_of_changes(tree))
            return _leaf_names(tree)
        except Exception as error:  # the user's own class, made of empty tensors
            raise_ours(error)
            return ()

    def _names_of_changes(self, outcome: Outcome) -> Iterator[str]:
        for change in outcome.changes:
            for key, part in zip(change.places, change.parts, strict=True):
                for path, _ in tree_flatten_with_path(opened(part, every=True))[0]:
                    yield text_of(
                        (*change.path, key, *_keys(path)),
                        self.positional,
                    )

    def lanes(self) -> dict[int, int | None]:
        """Flat input that is in an object which forward is given -> the flat output that stands in its place
        afterwards, None where it stays.
        """
        spec = self.in_spec
        outputs = {name: place for place, name in enumerate(self.output_names())}
        if not self.changes:
            outputs = {}
        lanes: dict[int, int | None] = {}
        tree = tree_unflatten(range(spec.num_leaves), spec)
        for path, place in tree_flatten_with_path(tree)[0]:
            if any(isinstance(key, GetAttrKey) for key in path):
                name = text_of(_keys(path), self.positional)
                left = outputs.get(name, -1)
                lanes[place] = left if left >= self.result_leaves else None
        return lanes

    def _rebind(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the example call gave them: by position or by name, defaults filled in."""
        values = self._by_name(args, kwargs)
        traced = (*self.positional, *self.keywords)
        for name in traced:
            default = self.parameters.get(name, ABSENT)
            if default is not ABSENT:
                values.setdefault(name, default)
            if name not in values:
                others = [f"'{other}'" for other in values if other not in traced]
                instead = f"; the program has no {', '.join(others)}" if others else ""
                raise InputError(
                    f"missing argument '{name}'{instead}",
                    hint=f"the program was traced with {', '.join(traced)}",
                )
        self._refuse_untraced(values)
        positional = tuple(values[name] for name in self.positional)
        return positional, {name: values[name] for name in self.keywords}

    def _by_name(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(dict.fromkeys([*self.parameters, *self.positional]))
        if len(args) > len(names):
            raise InputError(
                f"{len(args)} positional arguments, but the model takes at most {len(names)}",
                hint=f"those of the model are {', '.join(names) or 'none'}; what a loss function takes "
                "goes by name: driver.step(..., target=...)",
            )
        values = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in values:
                raise InputError(
                    f"argument '{name}' is given twice, by position and by name"
                )
            values[name] = value
        return values

    def _refuse_untraced(self, values: dict[str, Any]) -> None:
        """Raises InputError for an argument that the example call left out, unless it has its default."""
        traced = (*self.positional, *self.keywords)
        for name, value in values.items():
            if name in traced:
                continue
            if _is_default(value, self.parameters.get(name, ABSENT)):
                continue
            if name not in self.parameters:
                known = dict.fromkeys([*traced, *self.parameters])
                raise InputError(
                    f"forward names no argument '{name}', and none was given in the example call",
                    hint=nearest(name, known),
                )
            hint = f"add it to mb_args / mb_kwargs; {nearest(name, traced)}"
            raise InputError(
                f"argument '{name}' was not given in the example call, so the program does not depend on it",
                hint=hint,
            )

    def _difference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        by_position, by_name = children(self.in_spec)
        names = [*self.positional, *self.keywords]
        values = [*args, *kwargs.values()]
        specs = [*children(by_position), *children(by_name)]
        for name, value, spec in zip(names, values, specs, strict=True):
            actual = tree_flatten(opened_arguments(without_sizes(value)))[1]
            if actual != spec:
                return f"argument '{name}' has another structure: it is {shown_value(value)}"
        return "the nesting differs"


def _leaf_names(tree: Any) -> tuple[str, ...]:
    paths = tree_flatten_with_path(opened(tree))[0]
    return tuple(_path_text(path) for path, _ in paths)


def _keys(path: Sequence[Any]) -> tuple[Any, ...]:
    """The keys of a path in a pytree as Python has them: names of attributes, keys, indices."""
    return tuple(
        next(
            (
                getattr(key, name)
                for name in ("name", "key", "idx")
                if hasattr(key, name)
            ),
            str(key),
        )
        for key in path
    )


def _path_text(path: Sequence[Any]) -> str:
    """`hidden[1]` for the path ['hidden'][1], `[0]` for [0]."""
    if path and isinstance(path[0], MappingKey) and str(path[0].key).isidentifier():
        return f"{path[0].key}{keystr(tuple(path[1:]))}"
    return keystr(tuple(path)).removeprefix(".")


def is_size(value: Any) -> bool:
    """True for the shape of a tensor, which is a tuple of a class of its own."""
    return isinstance(value, torch.Size)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (
        isinstance(value, (bool, int, float, str))
        and type(value) is type(default)
        and value == default
    )


def signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of `forward` without annotations, which may name anything."""
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return inspect.Signature(parameters)


def parameters_of(forward: Callable[..., Any]) -> dict[str, Any]:
    """Names that `forward` takes by position or keyword, in order, with their defaults (`ABSENT` for
    none).
    """
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    parameters = inspect.signature(forward).parameters.items()
    return {
        name: parameter.default
        for name, parameter in parameters
        if parameter.kind in kinds
    }


def check_inputs(
    inputs: Sequence[Value],
    flat: Sequence[Any],
    ranges: Ranges | None = None,
    cast: bool = False,
) -> dict[str, int]:
    """The symbolic sizes of a call. Every flat input fits the type it was traced with, and every size its
    range. With `cast`, a floating dtype may be another one.

    Raises InputError naming the first input that does not.
    """
    sizes: dict[str, tuple[str, int]] = {}
    for value, argument in zip(inputs, flat, strict=True):
        if isinstance(value.type, TensorType):
            _check_tensor(value.hint, value.type, argument, sizes, cast)
        elif isinstance(value.type, ScalarType) and (
            value.type.expr is not None or value.type == NONE
        ):
            _check_scalar(value.hint, value.type, argument, sizes)
    return _check_sizes(sizes, ranges or {})


def unlike_example(name: str, kind: TensorType, given: Any) -> InputError:
    """The error for an input that was traced as a tensor of this type, and is none or has other dims."""
    is_now = shown_value(given)
    if given is None:
        is_now = "missing, or None"
    if isinstance(given, torch.Tensor):
        is_now = f"a tensor of shape {list(given.shape)}"
    return InputError(
        f"input '{name}' is {is_now}, and the program was traced with a tensor of shape {list(kind.shape)}",
        hint="pass such a tensor, as in the example; to run without it, trace without it",
    )


def _check_tensor(
    name: str,
    tensor_type: TensorType,
    argument: Any,
    sizes: dict[str, tuple[str, int]],
    cast: bool,
) -> None:
    """`sizes` gains the symbolic sizes of the input, each with the name of the input."""
    if not isinstance(argument, torch.Tensor):
        raise unlike_example(name, tensor_type, argument)
    free = cast and tensor_type.dtype in FLOATS and argument.is_floating_point()
    if SHORT.get(argument.dtype) != tensor_type.dtype and not free:
        raise InputError(
            f"dtype mismatch: input '{name}' has dtype {argument.dtype}, the program was traced with "
            f"torch.{DTYPES[tensor_type.dtype]}",
            hint=f"convert it, or {_AGAIN}",
        )
    fits = len(argument.shape) == len(tensor_type.shape)
    for size, traced in zip(argument.shape, tensor_type.shape, strict=False):
        if isinstance(traced, str):
            _, traced = sizes.setdefault(traced, (name, int(size)))
        fits &= size == traced
    if not fits:
        raise InputError(
            f"shape mismatch: input '{name}' has shape {list(argument.shape)}, the program was traced with "
            f"{list(tensor_type.shape)}",
            hint="pass dynamic_shapes=... to pipeline() for sizes that vary, or trace with the size you run",
        )


def _check_sizes(sizes: dict[str, tuple[str, int]], ranges: Ranges) -> dict[str, int]:
    """The value of each symbol. All sizes lie in their ranges, and sizes that are expressions of others agree
    with them.
    """
    for symbol, (name, size) in sizes.items():
        least, greatest = ranges.get(symbol, (None, None))
        if (least is not None and size < least) or (
            greatest is not None and size > greatest
        ):
            raise InputError(
                f"input '{name}' has a size of {size}, traced were {least or 0} to "
                f"{'any' if greatest is None else greatest}",
                hint='widen its range in dynamic_shapes: torch.export.Dim("n", min=..., max=...)',
            )
    derived = [symbol for symbol in sizes if not symbol.isidentifier()]
    if derived:
        return _check_derived(sizes, derived)
    return {symbol: size for symbol, (_, size) in sizes.items()}


def _check_derived(
    sizes: dict[str, tuple[str, int]], derived: list[str]
) -> dict[str, int]:
    import sympy

    numbers = {
        sympy.Symbol(symbol): size
        for symbol, (_, size) in sizes.items()
        if symbol.isidentifier()
    }
    for text in derived:
        name, size = sizes[text]
        symbols = {str(symbol): symbol for symbol in numbers}
        rest = expression(text, symbols).subs(numbers) - size
        unknown = list(rest.free_symbols)
        if len(unknown) == 1:  # the size tells what its symbol is
            roots = [
                root
                for root in sympy.solve(rest, unknown[0])
                if root.is_integer and root.is_nonnegative
            ]
            if roots:
                numbers[unknown[0]] = int(roots[0])
                continue
        if len(unknown) == 1 or (rest != 0 and not unknown):
            raise InputError(
                f"input '{name}' has a size of {size}, which is not {text} for the other sizes given",
                hint="pass sizes that fit each other as dynamic_shapes says",
            )
    return {str(symbol): number for symbol, number in numbers.items()}


def _check_scalar(
    name: str,
    scalar_type: ScalarType,
    argument: Any,
    sizes: dict[str, tuple[str, int]],
) -> None:
    """`sizes` gains the number, where it is one that varies: it has a symbol as a size has."""
    kind, expr = scalar_type.kind, scalar_type.expr
    if kind == "none" and argument is None:
        return
    if kind in ("int", "float", "bool", "str", "complex") and repr(argument) == expr:
        return
    is_fixed = (expr or "").lstrip("-").isdigit()
    if kind == "int" and expr is not None and not is_fixed and type(argument) is int:
        _, known = sizes.setdefault(expr, (name, argument))
        if known == argument:
            return
    kept = f"pass {name}={expr}, or " if expr and name.isidentifier() else ""
    raise InputError(
        f"input '{name}' is {argument!r}, but the program was specialised to {expr or kind}",
        hint=f"{kept}trace again with this value; a tensor stays variable, a Python scalar does not",
    )


def without_sizes(tree: Any) -> Any:
    """`tree` with a tuple for every torch.Size, as in the structure that torch.export has of a call."""
    return tree_map(
        lambda leaf: tuple(leaf) if is_size(leaf) else leaf, tree, is_leaf=is_size
    )
