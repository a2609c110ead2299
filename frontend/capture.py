"""nn.Module + example inputs -> ExportedProgram, with errors that point at the user's source line."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from stagecut.frontend.call import check_example
from stagecut.frontend.leaf import Leaves
from stagecut.frontend.lower import OWN_DIR, TORCH_DIR
from stagecut.ir.errors import CaptureError, StagecutError

MOST_RETRIES = 8
"""How often a capture is tried again with one more class of modules kept whole, before it gives up."""


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    leaf_modules: Sequence[str] = (),
) -> tuple[ExportedProgram, Leaves]:
    """The exported program of `module` on the example inputs, and the modules it keeps whole.

    Those are the ones in `leaf_modules`; where tracing fails inside a submodule, the smallest one around the failing line joins
    them, with a note. Raises InputError when the inputs do not fit the signature, CaptureError when the model cannot be traced.
    """
    check_example(module, args, kwargs)
    inputs = distinct_tensors((tuple(args), dict(kwargs)))
    leaves = Leaves(module, inputs)
    for path in leaf_modules:
        leaves.add(path)
    while True:
        try:
            return _export(module, inputs, dynamic_shapes, leaves), leaves
        except StagecutError:
            raise
        except Exception as error:
            path = _failing_module(module, error, leaves.paths)
            before = list(leaves.paths)
            if path and len(leaves.notes) < MOST_RETRIES and leaves.can_run():
                leaves.add_class(path)
            if leaves.paths == before:  # nothing more can be kept whole
                raise _refusal(module, error) from error
            leaves.notes.append(f"module '{path}' and all of its class are kept whole: {_first_line(error)} at {_user_frame(error)}")


def _export(module: nn.Module, inputs: Any, dynamic_shapes: Any, leaves: Leaves) -> ExportedProgram:
    watch = _AttributeWatch(module)
    with torch.random.fork_rng(), leaves.standing_in(), _inference_mode_as_no_grad(), watch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were assigned during export.*")  # _AttributeWatch looks closer
        args, kwargs = inputs
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    watch.refuse_changes(leaves.paths)
    return exported


@contextmanager
def _inference_mode_as_no_grad() -> Iterator[None]:
    """The tracer loses inference_mode; inside it becomes no_grad, which computes the same and is recorded."""
    cls: Any = torch.inference_mode
    enter, leave = cls.__enter__, cls.__exit__

    def start(self: Any) -> None:
        self._stagecut_before = torch.is_grad_enabled()
        if self.mode:
            torch.set_grad_enabled(False)

    def stop(self: Any, *_: Any) -> None:
        torch.set_grad_enabled(self._stagecut_before)

    cls.__enter__, cls.__exit__ = start, stop
    try:
        yield
    finally:
        cls.__enter__, cls.__exit__ = enter, leave


class _AttributeWatch:
    """Notices attributes that forward changes: a trace would freeze them at their first value."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: dict[tuple[str, str], Any] = {}
        self._changed: list[tuple[str, str, str]] = []
        self._handle: Any = None

    def __enter__(self) -> None:
        self._before = dict(_plain_attributes(self._module))
        self._handle = self._module.register_forward_hook(self._look, always_call=False)

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _look(self, *_: Any) -> None:
        for key, now in _plain_attributes(self._module):
            before = self._before.get(key)
            if before is not None and before != now:
                self._changed.append((*key, f"{before!s:.40} -> {now!s:.40}"))

    def refuse_changes(self, leaves: Sequence[str]) -> None:
        """Raises CaptureError when forward changed an attribute outside of the modules kept whole."""
        for path, name, change in self._changed:
            if any(path == leaf or path.startswith(leaf + ".") for leaf in leaves):
                continue
            owner = self._module.get_submodule(path)
            raise CaptureError(
                f"forward changes the attribute '{f'{path}.{name}'.lstrip('.')}' ({change}), which a trace would freeze",
                where=_place(type(owner)),
                hint="make it a buffer (register_buffer, changed in place), or keep the module whole: leaf_modules=[...]",
            )


def _plain_attributes(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """Numbers and sizes of containers among the attributes of all modules. Tensors may be caches: running twice tells."""
    for path, owner in module.named_modules():
        for name, item in vars(owner).items():
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                yield (path, name), item
            elif isinstance(item, (list, dict, set)) and not name.startswith("_"):
                yield (path, name), f"{len(item)} items"


def _place(cls: type) -> str:
    try:
        code = cls.forward.__code__  # type: ignore[attr-defined]
        return f"{code.co_filename}:{code.co_firstlineno}, {cls.__name__}.forward"
    except AttributeError:
        return f"class {cls.__name__}"


def _failing_module(module: nn.Module, error: BaseException, known: Sequence[str]) -> str:
    """The path of the smallest submodule whose frames the error went through and that is not kept whole yet, '' for none."""
    paths = {id(m): path for path, m in module.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        path = paths.get(id(owner), "") if isinstance(owner, nn.Module) else ""
        found = path or found
        trace = trace.tb_next
    while found in known:  # it failed as a whole too: the module around it
        found = found.rpartition(".")[0]
    return found


def distinct_tensors(tree: Any) -> Any:
    """`tree` with every repeated tensor object replaced by a copy: a tracer takes one tensor given twice for one input."""
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in seen:
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
        return leaf

    return tree_map(once, tree)


def _refusal(module: nn.Module, error: Exception) -> CaptureError:
    return CaptureError(
        f"{type(module).__name__} cannot be traced: {_first_line(error)}",
        where=_user_frame(error, type(module)),
        hint=_advice(error),
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _user_frame(error: Exception, cls: type | None = None) -> str:
    """file:line and source of the innermost frame that is neither torch's nor ours, else the place of the forward of `cls`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = os.path.abspath(frame.filename)
        if not path.startswith((TORCH_DIR, OWN_DIR)) and os.path.exists(path):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return _place(cls) if cls is not None else "no frame of the model's own source"


def _advice(error: Exception) -> str:
    name = type(error).__name__
    text = str(error)
    if "DataDependent" in name or "data-dependent" in text.lower():
        return (
            "the model branches on a value of a tensor: use torch.where or torch.cond there, or keep the module whole: leaf_modules=[...]"
        )
    if "constant's list" in text:
        return "a tensor made in forward replaced a parameter's data: write in place under torch.no_grad() instead of through .data"
    if "dynamic" in text and "constraint" in text.lower():
        return "loosen or correct dynamic_shapes: the model fixes a size that was declared to vary"
    if "pytree" in text:
        return "return tensors in tuples, lists, dicts or dataclasses registered with torch.utils._pytree"
    return "make this line traceable by torch.export (no data-dependent Python control flow, no foreign libraries on tensors)"
