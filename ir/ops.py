"""What an op is called, by the kind of its target. No torch here.

One op of torch has many spellings: `aten.detach.default` in an exported program, `torch.detach` and `method.detach` in a GraphModule,
`builtins.getattr(x, "data")` for an attribute. The user's own code may have any name at all: a module `enc.data`, a function `detach`. So
no rule reads a target: it asks for the base name, and the user's code has none.
"""

from __future__ import annotations

from stagecut.ir.graph import Op, Value, leaves

_REGISTERED = "torch.ops."
"""How the targets of ops begin that other libraries register."""

_SYMBOLS = {"pos": "positive"}
"""Functions of `operator` that torch knows by another name."""


def base_name(op: Op) -> str:
    """The name of an op of torch, however it is spelled: without namespace and overload. '' for all that is not torch's."""
    kind, _, rest = op.target.partition(".")
    if kind == "aten":
        return rest.partition(".")[0]
    if kind == "method":
        return rest
    if kind == "operator":
        return _SYMBOLS.get(rest, rest)
    if kind == "torch" and not op.target.startswith(_REGISTERED):
        return rest.rpartition(".")[2]
    return _attribute(op) if op.target == "builtins.getattr" else ""


def _attribute(op: Op) -> str:
    name = op.args[1] if len(op.args) > 1 else ""
    return name if isinstance(name, str) else ""


def library_name(op: Op) -> str:
    """The name of an op that another library registered, without its overload. '' for all else."""
    parts = op.target.removeprefix(_REGISTERED).split(".")
    return parts[1] if op.target.startswith(_REGISTERED) and len(parts) > 1 else ""


def module_path(op: Op) -> str:
    """The path of the module that an op calls as a whole. '' for all else."""
    return op.target.removeprefix("module.") if op.target.startswith("module.") else ""


def state_of(op: Op) -> list[Value]:
    """What the module holds that an op calls as a whole. Nothing for all else."""
    return list(leaves(op.args[2:3])) if module_path(op) else []


CUTTING = (
    *("data", "detach", "detach_", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
)
"""Ops whose results never carry gradient."""

GUARDS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})
"""Ops that a tracer adds to check its own assumptions; they compute nothing."""


def is_guard(op: Op) -> bool:
    """True for one of GUARDS."""
    return base_name(op) in GUARDS


def reads_around(op: Op) -> bool:
    """True for an op that may read all of the storage in which its first operand lies."""
    return base_name(op).startswith("as_strided")


_RESHAPES = frozenset({"t_", "transpose_", "swapaxes_", "swapdims_", "unsqueeze_", "squeeze_", "as_strided_", "detach_"})


def out_of_place(target: str) -> str:
    """The target of the view that an op takes which gives a tensor another shape in place, or detaches it. '' for other ops.

    Nothing in the memory is written, and the other views of it keep their shapes.
    """
    kind, _, rest = target.partition(".")
    name, _, overload = rest.partition(".") if kind == "aten" else (rest, "", "")
    if kind not in ("aten", "method", "torch") or name not in _RESHAPES:
        return ""
    if kind != "aten":
        return target.removesuffix("_")
    return f"aten.{name[:-1]}.{'int' if name == 'transpose_' else overload}"
