"""nn.Module + example inputs -> ExportedProgram, with errors that point at the user's source line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from stagecut.frontend.capture.aside import modes_aside
from stagecut.frontend.capture.eager import FORWARDS, EagerPath, Reason
from stagecut.frontend.capture.example import (
    check_example,
    giving_sizes,
    keywords_by_name,
    shapes_by_name,
)
from stagecut.frontend.capture.functions import functions_whole
from stagecut.frontend.capture.quiet import quiet_torch
from stagecut.frontend.capture.rewrites import visible
from stagecut.frontend.capture.scopes import scopes
from stagecut.frontend.capture.whole import Leaves
from stagecut.frontend.fold.repeats import Repeats
from stagecut.frontend.source import failing_line, first_line, gpus, shown, user_line
from stagecut.frontend.watch.attributes import Containers
from stagecut.frontend.watch.forbidden import KEEP_WHOLE, Untraceable
from stagecut.frontend.watch.known import KnownValues
from stagecut.frontend.watch.watch import (
    TraceEach,
    TraceWatch,
    odd_output,
    watched,
)
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError, InputError, StagecutError
from stagecut.ir.run.given import (
    mapped,
    opened_arguments,
    opening,
    refuse_shared,
)
from stagecut.ir.run.objects import numbers_and_texts

MOST_RETRIES = 8
"""How often a capture is tried again with one more class of modules kept whole, before it gives up."""


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    leaf_modules: Sequence[str] = (),
    eager: EagerPath | None = None,
    fold: bool = False,
    grad: bool = True,
) -> tuple[ExportedProgram, Leaves]:
    """The exported program of `module` on the example inputs, and the modules that are kept whole.

    `eager` has the paths that code takes where it asks if it is traced. Two captures that share it take the
    same ones.

    With `fold`, a block that the model repeats is traced twice. One node stands for each further call that is
    traced alike, until the program is lowered.

    Code that asks whether gradients are on hears what `grad` says.

    The modules kept whole are those in `leaf_modules` and the ones that capture adds, each with a note. Where
    tracing fails inside a submodule, it adds the smallest one around the failing line. Where a size that
    depends on data stops the model's own code, it adds the module that makes that size. Raises InputError
    when the inputs do not fit the signature, CaptureError when the model cannot be traced.
    """
    check_example(module, args, kwargs)
    inputs = distinct_tensors((tuple(args), dict(kwargs)))
    leaves = Leaves(module, inputs, grad)
    for path in leaf_modules:
        leaves.add(path)
    leaves.add_packed()
    eager = eager or EagerPath(module)
    retries = _Retries(module, leaves, eager, dynamic_shapes)
    while True:
        try:
            exported = _export(module, inputs, dynamic_shapes, leaves, eager, fold)
            retries.check_numbers()
            break
        except TraceEach:
            fold = False
        except StagecutError as error:
            if not retries.after_refusal(error):
                raise
        except Exception as error:
            raise_ours(error)
            retries.after_failure(error)
    signature = exported.module_call_graph[0].signature
    if signature is not None:
        refuse_shared(signature.out_spec, (args, kwargs))
    leaves.trace_notes += eager.notes
    return exported, leaves


class _Retries:
    """Attempts to trace a model after one that failed. Before each, a function takes the path that it has for
    tracing, or more modules are kept whole.
    """

    def __init__(
        self, module: nn.Module, leaves: Leaves, eager: EagerPath, shapes: Any
    ) -> None:
        self._module = module
        self._shapes = shapes
        self._leaves = leaves
        self._eager = eager
        self._count = 0
        self._refusals: dict[type, CaptureError] = {}
        """Class of a module that is kept whole because it makes a size -> the error before that."""

    def check_numbers(self) -> None:
        """Raises the first error again where a module that was to make a size returns a plain number: forward
        branches on that number, and not on a size.
        """
        for call in self._leaves.calls.values():
            cls = type(self._module.get_submodule(call.path))
            if cls in self._refusals and numbers_and_texts(call.out_flat):
                raise self._refusals[cls]

    def after_refusal(self, error: StagecutError) -> bool:
        """Prepares another attempt after a refusal of ours. Returns False where none can help."""
        reason = Reason(error.what, error.where, error.hint or MAKE_TRACEABLE)
        if self._eager.fall_back_everywhere(reason):
            return True
        path = error.module if isinstance(error, CaptureError) else ""
        if path in self._leaves.paths or not self._can_keep_whole(path):
            return False
        self._keep_whole(path, reason)
        return True

    def after_failure(self, error: Exception) -> None:
        """Prepares another attempt after a failure of the trace. Raises CaptureError where none can help, and
        InputError for dynamic shapes that do not fit.
        """
        if self._shapes is not None and _while_reading_shapes(error):
            raise InputError(
                f"dynamic_shapes does not fit the example inputs: {first_line(error)}",
                hint=(
                    'as for torch.export.export: {"x": {0: Dim("batch")}}, by the names of the arguments of '
                    "forward, or a tuple of such dicts in their order"
                ),
            ) from error
        reason = Reason(_reason(error), failing_line(error), _otherwise(error))
        if self._eager.fall_back(error, reason):
            return
        refusal = _refusal(self._module, error, self._leaves.reasons)
        path = _failing_module(self._module, error, self._leaves.paths)
        if not path:
            path = _origin(self._module, error, self._leaves.paths)
            if path:
                self._refusals[type(self._module.get_submodule(path))] = refusal
        if not self._can_keep_whole(path):
            raise refusal from error
        self._keep_whole(path, reason)

    def _can_keep_whole(self, path: str) -> bool:
        return bool(path) and self._count < MOST_RETRIES and self._leaves.can_run()

    def _keep_whole(self, path: str, reason: Reason) -> None:
        self._leaves.add_class(path, str(reason))
        self._count += 1


def _export(
    module: nn.Module,
    inputs: Any,
    dynamic_shapes: Any,
    leaves: Leaves,
    eager: EagerPath,
    fold: bool,
) -> ExportedProgram:
    def export(watch: TraceWatch) -> ExportedProgram:
        args, kwargs = inputs
        known = KnownValues()
        repeats = Repeats(module, watch, known)
        seeds = torch.random.fork_rng(gpus(module, inputs))
        sizes = giving_sizes(module, inputs)
        with (
            quiet_torch(),
            seeds,
            torch.set_grad_enabled(leaves.grad),
            leaves.standing_in(),
            modes_aside(),
            visible(),
            watch.checks,
            known,
            keywords_by_name(),
            opening(module),
            # what forward is given is the caller's, and each trace begins with it as it was
            Containers(inputs).put_back(),
            sizes,
            eager.open(),
            watch,
            functions_whole(watch.notes, lambda: shown(user_line())),
            scopes(module),
            repeats.open() if fold else nullcontext(),
        ):
            return torch.export.export(
                module,
                opened_arguments(args),
                opened_arguments(kwargs),
                dynamic_shapes=shapes_by_name(module, dynamic_shapes),
                strict=False,
            )

    return watched(
        module,
        export,
        leaves.paths,
        leaves.trace_notes,
        leaves.attributes_read,
        folded=fold,
    )


def _while_reading_shapes(error: BaseException) -> bool:
    """True for an error of torch.export before the model runs, when it makes inputs of these shapes."""
    names = [step.name for step in traceback.extract_tb(error.__traceback__)]
    return "make_fake_inputs" in names


def _failing_module(
    module: nn.Module, error: BaseException, whole: Sequence[str]
) -> str:
    """The path of the smallest submodule whose forward the error went through and that is not kept whole yet;
    '' for none.
    """
    # by the module's dict: a tracer may put another object in front of a module
    paths = {id(vars(owner)): path for path, owner in module.named_modules()}
    innermost = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # other methods fail on behalf of the module that calls them
        if frame.f_code.co_name not in FORWARDS:
            continue
        path = paths.get(id(getattr(frame.f_locals.get("self"), "__dict__", None)), "")
        if path in whole:  # it failed as a whole too: take the module around it
            break
        innermost = path or innermost
    return innermost


def _origin(module: nn.Module, error: BaseException, whole: Sequence[str]) -> str:
    """The path of the submodule that first makes a number on which `error` depends, where only numbers that
    depend on data are in the way; '' for none.
    """
    symbols = getattr(getattr(error, "cond", None), "free_symbols", None)
    if not isinstance(error, GuardOnDataDependentSymNode) or not symbols:
        return ""
    paths = {path for path, _ in module.named_modules()}
    for node in _traced_graph(error).nodes:
        if node.op == "call_function" and _symbols_in(node.meta.get("val")) & symbols:
            path = _module_path(node)
            return path if path in paths and path not in whole else ""
    return ""


def _traced_graph(error: BaseException) -> fx.Graph:
    """The graph that was being traced when the error was raised; an empty one where no tracer is seen."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        tracer = frame.f_locals.get("self")
        if isinstance(tracer, fx.Tracer) and hasattr(tracer, "graph"):
            return tracer.graph
    return fx.Graph()


def _symbols_in(number: Any) -> set[Any]:
    """The symbols in a number that a trace computes; none for other values."""
    expression = getattr(getattr(number, "node", None), "expr", None)
    symbols: set[Any] = getattr(expression, "free_symbols", set())
    return symbols


def _module_path(node: fx.Node) -> str:
    """The path of the innermost module around a node of a trace."""
    innermost: str = [*node.meta.get("nn_module_stack", ("",))][-1]
    return innermost.removeprefix("_export_root").removeprefix(".")


def distinct_tensors(tree: Any) -> Any:
    """`tree` with every repeated tensor object replaced by a copy, because a tracer takes one tensor given
    twice for one input.
    """
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in seen:
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        seen.add(id(leaf))
        return leaf

    return mapped(once, tree)


def _refusal(
    module: nn.Module, error: Exception, whole: Mapping[str, str]
) -> CaptureError:
    """The error for the user. `whole` has the modules that capture has tried to keep whole before, and
    why.
    """
    name, text = type(module).__name__, str(error)
    odd = _ODD.search(text)
    if odd is not None:
        return odd_output(module, odd[1] or odd[2])
    earlier = [
        f"before that, in module '{path}': {reason}" for path, reason in whole.items()
    ][:1]
    return CaptureError(
        f"{name} cannot be traced: {'; '.join([_reason(error), *_GUARD.findall(text), *earlier])}",
        where=failing_line(error, type(module)),
        hint=_advice(error),
    )


_ODD = re.compile(
    r"^'(\w+)' object has no attribute 'meta'$|^Found <class '([\w.]+)'> in output"
)
"""The message with which torch.export fails on an object that a model must not return."""

_GUARD = re.compile(r"^  - (.* (?:range|constant) .*)$", re.MULTILINE)
"""The part of torch's message about a size that was declared to vary."""


def _reason(error: Exception) -> str:
    """The reason of a failure on one line. torch names its errors about data for itself."""
    if not _is_about_data(error):
        return first_line(error)
    _, _, told = first_line(error).partition(": ")
    about = f"{type(error).__name__}: {getattr(error, 'cond', told)}"
    return f"what its code does depends on the data in a tensor ({about})"


MAKE_TRACEABLE = "change that line so that torch.export can trace it"
_ABOUT_DTYPES = re.compile(r"\bdtypes?\b|\btorch\.b?float\d+\b|\bBF16\b", re.IGNORECASE)


def _otherwise(error: Exception) -> str:
    """How a line that failed could be traced."""
    if _is_about_data(error):
        return "leave out the input that this line reads, such as a mask of ones"
    if isinstance(error, Untraceable) and error.hint:
        return error.hint
    if _ABOUT_DTYPES.search(str(error)):
        return "cut the model in a dtype that this line takes in a trace"
    return MAKE_TRACEABLE


def _is_about_data(error: Exception) -> bool:
    name = type(error).__name__
    return "DataDependent" in name or "data-dependent" in str(error).lower()


def _advice(error: Exception) -> str:
    if isinstance(error, Untraceable) and error.hint:
        return error.hint
    text = str(error)
    if _is_about_data(error):
        return (
            "the model branches on a value of a tensor, or reads one as a number: use torch.where or "
            "torch.cond for a branch, pass the number as an argument, or move the code into a submodule, "
            "which is kept whole"
        )
    if "dynamic" in text and "constraint" in text.lower():
        fixes = text.partition("Suggested fixes:\n")[2].partition("\n\n")[0].split("\n")
        suggested = "; ".join(line.strip() for line in fixes if line.strip())
        hint = "loosen or correct dynamic_shapes: the model fixes a size that was declared to vary"
        return f"{hint}; torch suggests {suggested}" if suggested else hint
    if "Unsupported input type" in text:
        return (
            "pass tensors, numbers, texts and None in tuples, lists, dicts, registered pytrees and objects "
            "that are nothing but such attributes (no __slots__, no cycles, no classes derived from list or "
            "dict); give __init__ what is none of these"
        )
    if "pytree" in text:
        return (
            "pass tuples, lists and dicts; return those, or objects whose attributes are data; or register "
            "the class as a pytree"
        )
    return (
        "call the model with these inputs: where that fails in the same way, change the inputs or the model; "
        "where it runs, make this line traceable by torch.export (no Python control flow that depends on "
        f"data, no numpy or other libraries on tensors), {KEEP_WHOLE}"
    )
