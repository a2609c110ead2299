"""The JSON files of a saved pipe, as structs that decode strictly, and the calling convention of a model in
them. Pytrees consist of built-in containers, and of classes that this process has registered already.

Nothing is imported and no name is looked up outside of torch's registry of pytree nodes; a named tuple must
be in a module that is imported already. `torch.utils._pytree.treespec_loads` is not used, because it may
import modules that its input names.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from torch.utils import _pytree
from torch.utils._pytree import TreeSpec

from stagecut.backend.files.untrusted import MAX_JSON, SAVE_AGAIN, SavedError, read
from stagecut.ir.errors import ParseError
from stagecut.ir.run.call import ABSENT, CallSpec
from stagecut.ir.run.given import Apart, Given, Outcome
from stagecut.ir.run.objects import Constant, Opened
from stagecut.ir.text.parser import parse_literal
from stagecut.ir.text.printer import tree_text
from stagecut.ir.version import VERSION

try:
    import msgspec
    from msgspec import Struct
except ImportError:
    raise SavedError(
        "msgspec is not installed", hint="pip install 'stagecut[safetensors]'"
    ) from None

FORMAT = 2
"""The format that is written, and the only one that is read."""
MAX_DEPTH = 64
"""Deepest nesting of arguments and outputs that is read."""
_TORCH_OWN = ("torch.Size", "torch.return_types.", "torch.fx.immutable_collections.")
_SHORT = {"builtins.tuple": "tuple", "builtins.list": "list", "builtins.dict": "dict"}
_LONG = {short: name for name, short in _SHORT.items()}
_KEYED = ("dict", "collections.OrderedDict")
_LEAVES = (NoneType, bool, int, float, complex, str)


# --- files ------------------------------------------------------------------------------------------------


class _Strict(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A JSON object with these keys and no others."""


class Node(_Strict, frozen=True):
    """A node of a pytree. Its context is a literal in the words of the IR; a named tuple has fields."""

    name: str
    children: list[Node | None]
    context: str = "None"
    fields: list[str] | None = None


class Parameter(_Strict, frozen=True):
    """A parameter of forward. Its default is a literal in the words of the IR, None where it has none."""

    name: str
    default: str | None = None


class Call(_Strict, frozen=True):
    """A `CallSpec`. A leaf of `inputs` and `outputs` is null."""

    positional: list[str]
    keywords: list[str]
    parameters: list[Parameter]
    inputs: Node | None
    outputs: Node | None
    ranges: dict[str, tuple[int | None, int | None]]


class Module(_Strict, frozen=True):
    """A module of the model: what `Bindings` say of its class and its modes, and what it prints of itself."""

    title: str
    captured: bool
    branch: str
    switches: dict[str, dict[str, bool]]
    described: str = ""


class Written(_Strict, frozen=True):
    """The program that was written."""

    sha256: str
    fingerprint: str
    stages: int


class Manifest(_Strict, frozen=True):
    """manifest.json"""

    format: int
    stagecut: str
    torch: str
    program: Written
    names: list[str]
    training: bool
    modules: dict[str, Module]
    sizes: dict[str, int]
    notes: list[str]
    call: Call | None


class Description(_Strict, frozen=True):
    """The facts that a safetensors file does not hold of a tensor. `strides` is None for a contiguous one."""

    requires_grad: bool
    strides: list[int] | None


class Side(_Strict, frozen=True):
    """stage-K.json"""

    format: int
    fingerprint: str
    stage: int
    sha256: str
    training: dict[str, bool]
    tensors: dict[str, Description]


class _Versioned(Struct):
    format: int


File = TypeVar("File", Manifest, Side)


def read_json(path: Path, file_class: type[File]) -> File:
    """The contents of a JSON file of that kind. Raises SavedError for anything else, its format first."""
    content = read(path, MAX_JSON)
    try:
        version = msgspec.json.decode(content, type=_Versioned).format
        if version == FORMAT:
            return msgspec.json.decode(content, type=file_class)
    except (ValueError, RecursionError) as error:
        raise SavedError(
            f"'{path.name}' is no file of a saved pipe: {str(error)[:200]}",
            where=str(path.parent),
            hint=SAVE_AGAIN,
        ) from None
    hint = "update" if version > FORMAT else "cut the model and save it again"
    raise SavedError(
        f"'{path.name}' has format {version}, this stagecut {VERSION} reads {FORMAT}",
        where=str(path.parent),
        hint=hint,
    )


def write_json(path: Path, content: Manifest | Side) -> None:
    """`path` holds the content, the same bytes for the same content."""
    try:
        encoded = msgspec.json.encode(content)
    except UnicodeEncodeError as error:
        raise SavedError(f"{error.object!r} is no text that JSON can hold") from None
    path.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")


# --- calling convention -----------------------------------------------------------------------------------


def call_form(call: CallSpec) -> Call:
    """The calling convention as it is written. A default that is no plain literal is left out: it must be
    given in every call.
    """
    return Call(
        list(call.positional),
        list(call.keywords),
        [_parameter(name, default) for name, default in call.parameters.items()],
        _form(call.in_spec, "an argument"),
        _form(call.out_spec, "the output"),
        dict(call.ranges),
    )


def call_spec(call: Call, inputs: int, outputs: int) -> CallSpec:
    """The calling convention of a program with so many flat inputs and outputs. Raises SavedError for a form
    that is none.
    """
    in_spec = _spec(call.inputs, 0)
    out_spec = _spec(call.outputs, 0)
    if in_spec.num_leaves != inputs or out_spec.num_leaves != outputs:
        raise SavedError(
            f"the call has {in_spec.num_leaves} inputs and {out_spec.num_leaves} outputs, the program "
            f"{inputs} and {outputs}"
        )
    parts = _children(in_spec)
    if in_spec.type is not tuple or [part.type for part in parts] != [tuple, dict]:
        raise SavedError("the inputs of a call are a tuple and a dict")
    if (
        len(_children(parts[0])) != len(call.positional)
        or parts[1].context != call.keywords
    ):
        raise SavedError("the inputs of the call do not fit the names of its arguments")
    return CallSpec(
        tuple(call.positional),
        tuple(call.keywords),
        {parameter.name: _default(parameter) for parameter in call.parameters},
        in_spec,
        out_spec,
        dict(call.ranges),
    )


def _parameter(name: str, default: Any) -> Parameter:
    return Parameter(name, tree_text(default) if _is_plain(default) else None)


def _default(parameter: Parameter) -> Any:
    if parameter.default is None:
        return ABSENT
    return _literal(parameter.default)


def _literal(text: str) -> Any:
    """The plain literal that a text describes. Raises SavedError for a text that describes none."""
    try:
        tree = parse_literal(text)
    except ParseError as error:
        raise SavedError(f"a literal cannot be read: {error}") from None
    if not _is_plain(tree):
        raise SavedError(f"{text[:80]} is no plain literal")
    return tree


def _is_plain(tree: Any) -> bool:
    """True for a literal that means the same everywhere: built-in containers of numbers, strings and None."""
    if type(tree) in (list, tuple):
        return all(map(_is_plain, tree))
    if type(tree) is dict:
        keys = all(type(key) in _LEAVES for key in tree)
        return keys and all(map(_is_plain, tree.values()))
    return type(tree) in _LEAVES


# --- pytrees ----------------------------------------------------------------------------------------------


def _children(spec: TreeSpec) -> list[TreeSpec]:
    children: Any = getattr(spec, "children", None)
    specs: Any = children() if callable(children) else spec.children_specs
    return list(specs)


def _is_leaf(spec: TreeSpec) -> bool:
    return spec.num_nodes == 1 and spec.type is None


def _form(spec: TreeSpec, what: str) -> Node | None:
    """A pytree as it is written: None for a leaf."""
    if _is_leaf(spec):
        return None
    children = [_form(child, what) for child in _children(spec)]
    # torch uses the function namedtuple as the type of all named tuples
    if spec.type is namedtuple:
        return Node(_name(spec.context), children, fields=list(spec.context._fields))
    if spec.type in (Outcome, Given):
        raise SavedError(
            "forward changes what it is given, or returns it, and no file says how",
            hint="return new tuples, lists and dicts; call a decoder with use_cache=False",
        )
    if spec.type in (Opened, Apart, Constant):
        cls = type(spec.context) if spec.type is Constant else spec.context.cls
        raise SavedError(
            f"{what} of the model holds a {_name(cls)}, an object that load could not make without code of "
            "its class",
            hint=(
                "return tuples, lists, dicts, or classes registered by torch.utils._pytree; call a decoder "
                "with use_cache=False"
            ),
        )
    name = _name(spec.type)
    if not _may_be_read(name) or not _is_plain(spec.context):
        raise SavedError(
            f"{what} of the model is a {name}, whose structure is more than data",
            hint=(
                "let forward take and return tuples, lists, dicts, or classes registered by "
                "torch.utils._pytree with a plain context"
            ),
        )
    return Node(_SHORT.get(name, name), children, tree_text(spec.context))


def _spec(form: Node | None, depth: int) -> TreeSpec:
    if form is None:
        return _pytree.tree_structure(0)
    if depth > MAX_DEPTH:
        raise SavedError(f"arguments or outputs are nested more than {MAX_DEPTH} deep")
    children = [_spec(child, depth + 1) for child in form.children]
    if form.fields is not None:
        cls = _named_tuple(form.name, form.fields, len(children))
        return TreeSpec(namedtuple, cls, children)
    node = _registered(_LONG.get(form.name, form.name))
    context = _literal(form.context)
    _check_context(form.name, context, len(children))
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
    if not _may_be_read(name):
        raise _unknown(name)
    for cls in _pytree.SUPPORTED_NODES:
        if isinstance(cls, type) and _name(cls) == name:
            return cls
    raise _unknown(name)


def _named_tuple(name: str, fields: list[str], children: int) -> type:
    """The named tuple of that name, when its module is imported already. No attribute is computed in the
    search.
    """
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        candidate: Any = sys.modules.get(".".join(parts[:split]))
        for part in parts[split:]:
            attributes = vars(candidate) if hasattr(candidate, "__dict__") else {}
            candidate = attributes.get(part)
        if isinstance(candidate, type) and _pytree.is_namedtuple_class(candidate):
            own_fields = list(vars(candidate)["_fields"])
            if own_fields == fields and len(fields) == children:
                return candidate
            raise SavedError(
                f"{name} has the fields {own_fields} here, saved were {fields}"
            )
    raise _unknown(name)


def _unknown(name: str) -> SavedError:
    return SavedError(
        f"the model takes or returns a {name[:200]}, which this process does not know",
        hint=(
            "import the module that defines it, and registers it with torch.utils._pytree, before load: "
            "load imports nothing by itself"
        ),
    )
