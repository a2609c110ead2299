"""The calling convention of a model <-> JSON. Pytrees consist of built-in containers, and of classes that
this process has registered already.

Nothing is imported and no name is looked up outside of torch's registry of pytree nodes; a named tuple must
be in a module that is imported already. `torch.utils._pytree.treespec_loads` is not used, because it may
import modules that its input names.
"""

from __future__ import annotations

import json
import math
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import _pytree
from torch.utils._pytree import TreeSpec

from stagecut.ir.errors import StagecutError
from stagecut.ir.run.call import ABSENT, CallSpec
from stagecut.ir.run.objects import Constant, Opened

MAX_DEPTH = 64
"""Deepest nesting of arguments and outputs that is read."""
_TORCH_OWN = ("torch.Size", "torch.return_types.", "torch.fx.immutable_collections.")
_SHORT = {"builtins.tuple": "tuple", "builtins.list": "list", "builtins.dict": "dict"}
_LONG = {short: name for name, short in _SHORT.items()}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_MADE: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "dict": dict,
    "complex": lambda parts: complex(*parts),
}
_KEYED = ("dict", "collections.OrderedDict")


class SavedError(StagecutError):
    """A saved pipe is missing, damaged or of a newer format, or a pipe cannot be saved."""


def to_json(call: CallSpec) -> dict[str, Any]:
    """The calling convention as JSON. A default that is no plain literal is left out: it must be given in
    every call.
    """
    return {
        "positional": list(call.positional),
        "keywords": list(call.keywords),
        "parameters": [
            [name, *_default(item)] for name, item in call.parameters.items()
        ],
        "inputs": _form(call.in_spec, "an argument"),
        "outputs": _form(call.out_spec, "the output"),
        "ranges": {symbol: list(limits) for symbol, limits in call.ranges.items()},
    }


SHAPE = {
    "positional": [str],
    "keywords": [str],
    "parameters": [list],
    "inputs": object,
    "outputs": object,
    "ranges": {"*": [(int, None)]},
}
"""The shape that `check` requires of the JSON form."""


def from_json(data: dict[str, Any], inputs: int, outputs: int) -> CallSpec:
    """The calling convention of a program with so many flat inputs and outputs. Raises SavedError for JSON
    that is none.
    """
    in_spec, out_spec = _spec(data["inputs"], 0), _spec(data["outputs"], 0)
    if in_spec.num_leaves != inputs or out_spec.num_leaves != outputs:
        raise SavedError(
            f"the call has {in_spec.num_leaves} inputs and {out_spec.num_leaves} outputs, the program "
            f"{inputs} and {outputs}"
        )
    parts = _children(in_spec)
    if in_spec.type is not tuple or [part.type for part in parts] != [tuple, dict]:
        raise SavedError("the inputs of a call are a tuple and a dict")
    if (
        len(_children(parts[0])) != len(data["positional"])
        or parts[1].context != data["keywords"]
    ):
        raise SavedError("the inputs of the call do not fit the names of its arguments")
    parameters = {}
    for name, *default in data["parameters"]:
        check(name, str, "a parameter")
        parameters[name] = literal(default[0]) if default else ABSENT
    ranges = {symbol: _limits(item) for symbol, item in data["ranges"].items()}
    return CallSpec(
        tuple(data["positional"]),
        tuple(data["keywords"]),
        parameters,
        in_spec,
        out_spec,
        ranges,
    )


def _limits(item: list[int | None]) -> tuple[int | None, int | None]:
    if len(item) != 2:
        raise SavedError("a range has a least and a greatest value")
    return item[0], item[1]


def _default(item: Any) -> Iterator[Any]:
    if item is ABSENT:
        return
    try:
        yield plain(item)
    except TypeError:
        return


# --- literals ---------------------------------------------------------------------------------------------


def plain(item: Any) -> Any:
    """A literal as JSON that tells tuples from lists. Raises TypeError for anything else."""
    if (
        item is None
        or type(item) in (bool, int, str)
        or (type(item) is float and math.isfinite(item))
    ):
        return item
    if type(item) is float:
        return {"float": repr(item)}
    if type(item) is complex:
        return {"complex": [plain(item.real), plain(item.imag)]}
    if type(item) is list:
        return [plain(part) for part in item]
    if type(item) is tuple:
        return {"tuple": [plain(part) for part in item]}
    if type(item) is dict:
        return {"dict": [[plain(key), plain(part)] for key, part in item.items()]}
    raise TypeError(f"a {type(item).__name__} is no plain literal")


def literal(data: Any, depth: int = 0) -> Any:
    """The literal that the JSON stands for. Raises SavedError for JSON that is no literal."""
    if depth > MAX_DEPTH:
        raise SavedError(f"a literal is nested more than {MAX_DEPTH} deep")
    if isinstance(data, list):
        return [literal(part, depth + 1) for part in data]
    if not isinstance(data, dict):
        return data
    try:
        ((kind, content),) = data.items()
        return _tagged(kind, content, depth + 1)
    except (ValueError, TypeError, KeyError):
        raise SavedError(f"{json.dumps(data)[:80]} is no literal") from None


def _tagged(kind: str, content: Any, depth: int) -> Any:
    if kind == "float":
        return _FLOATS[content]
    inner = literal(check(content, list, "a literal"), depth)
    return _MADE[kind](inner)


# --- pytrees ----------------------------------------------------------------------------------------------


def _children(spec: TreeSpec) -> list[TreeSpec]:
    children: Any = getattr(spec, "children", None)
    found: Any = children() if callable(children) else spec.children_specs
    return list(found)


def _is_leaf(spec: TreeSpec) -> bool:
    return spec.num_nodes == 1 and spec.type is None


def _form(spec: TreeSpec, what: str) -> Any:
    """A pytree as JSON: null for a leaf, else [class, context, children]."""
    if _is_leaf(spec):
        return None
    children = [_form(child, what) for child in _children(spec)]
    # torch uses the function namedtuple as the type of all named tuples
    if spec.type is namedtuple:
        return [
            "namedtuple",
            {"class": _name(spec.context), "fields": list(spec.context._fields)},
            children,
        ]
    if spec.type in (Opened, Constant):
        kind = spec.context.kind if spec.type is Opened else type(spec.context)
        raise SavedError(
            f"{what} of the model holds a {_name(kind)}, an object that load could not make without code of "
            "its class",
            hint=(
                "return tuples, lists, dicts, or classes registered by torch.utils._pytree; call a decoder "
                "with use_cache=False"
            ),
        )
    name = _name(spec.type)
    try:
        if not _may_be_read(name):
            raise TypeError("it is more than data")
        return [_SHORT.get(name, name), plain(spec.context), children]
    except TypeError as error:
        raise SavedError(
            f"{what} of the model is a {name}, whose structure cannot be written down: {error}",
            hint=(
                "let forward take and return tuples, lists, dicts, or classes registered by "
                "torch.utils._pytree with a plain context"
            ),
        ) from None


def _spec(form: Any, depth: int) -> TreeSpec:
    if form is None:
        return _pytree.tree_structure(0)
    if depth > MAX_DEPTH:
        raise SavedError(f"arguments or outputs are nested more than {MAX_DEPTH} deep")
    if not (
        isinstance(form, list)
        and len(form) == 3
        and isinstance(form[0], str)
        and isinstance(form[2], list)
    ):
        raise SavedError("a node of a pytree is [class, context, children]")
    name: str = form[0]
    context, forms = form[1:]
    children = [_spec(child, depth + 1) for child in forms]
    if name == "namedtuple":
        check(context, {"class": str, "fields": [str]}, "a named tuple")
        return TreeSpec(
            namedtuple,
            _named_tuple(context["class"], context["fields"], len(children)),
            children,
        )
    node, context = _registered(_LONG.get(name, name)), literal(context)
    _check_context(name, context, len(children))
    return TreeSpec(node, context, children)


def _check_context(name: str, context: Any, children: int) -> None:
    """Returns when a built-in container can have that context."""
    if name in ("tuple", "list") and context is not None:
        raise SavedError(f"a {name} has no context")
    if name not in _KEYED:
        return
    try:
        fits = (
            isinstance(context, list) and len(set(context)) == len(context) == children
        )
    except TypeError:
        fits = False
    if not fits:
        raise SavedError(f"a {name} has one key for each of its values")


def _name(node: Any) -> str:
    return f"{node.__module__}.{node.__qualname__}"


def _may_be_read(name: str) -> bool:
    """False for classes whose contexts hold more than data: a factory of values, a function of
    torch's own.
    """
    return name != "collections.defaultdict" and (
        not name.startswith("torch.") or name.startswith(_TORCH_OWN)
    )


def _registered(name: str) -> type:
    found = next(
        (
            node
            for node in _pytree.SUPPORTED_NODES
            if isinstance(node, type) and _name(node) == name
        ),
        None,
    )
    if found is None or not _may_be_read(name):
        raise _unknown(name)
    return found


def _named_tuple(name: str, fields: list[str], children: int) -> type:
    """The named tuple of that name, when its module is imported already. No attribute is computed in the
    search.
    """
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:split]))
        for part in parts[split:]:
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        if isinstance(found, type) and _pytree.is_namedtuple_class(found):
            here = list(vars(found)["_fields"])
            if here == fields and len(fields) == children:
                return found
            raise SavedError(f"{name} has the fields {here} here, saved were {fields}")
    raise _unknown(name)


def _unknown(name: str) -> SavedError:
    return SavedError(
        f"the model takes or returns a {name[:200]}, which this process does not know",
        hint=(
            "import the module that defines it, and registers it with torch.utils._pytree, before load: "
            "load imports nothing by itself"
        ),
    )


# --- shapes of JSON ---------------------------------------------------------------------------------------


def check(data: Any, shape: Any, where: str) -> Any:
    """`data`, when it has that shape: a type, None, [shape of each], {"*": shape of each}, {key: shape}, or a
    tuple of choices.
    """
    if not _fits(data, shape):
        raise SavedError(
            f"{where} is not as it was written",
            hint="the file is damaged, or was made by something else",
        )
    return data


def _fits(data: Any, shape: Any) -> bool:
    if shape is object or shape is None:
        return shape is object or data is None
    if isinstance(shape, tuple):
        return any(_fits(data, choice) for choice in shape)
    if isinstance(shape, list):
        return type(data) is list and all(_fits(item, shape[0]) for item in data)
    if isinstance(shape, dict):
        if type(data) is not dict or ("*" not in shape and data.keys() != shape.keys()):
            return False
        return all(
            _fits(item, shape.get(key, shape.get("*"))) for key, item in data.items()
        )
    return type(data) is shape
