"""The public API: `pipeline` compiles a model, `Pipe` is the result."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from stagecut.backend.progress import doing
from stagecut.backend.stages.fx_view import PREFIX, split_module
from stagecut.backend.stages.sampled import sampled
from stagecut.backend.stages.staged import Staged
from stagecut.check import (
    CannotCompare,
    CheckError,
    Report,
    as_written,
    compare,
    failure_on,
    holds_both_modes,
    is_cheap,
    is_real,
)
from stagecut.frontend.capture.batch import mark_batches
from stagecut.frontend.capture.capture import capture
from stagecut.frontend.capture.eager import EagerPath
from stagecut.frontend.capture.example import check_containers, failing_on_example
from stagecut.frontend.lower.both_modes import follow, hold_one_mode
from stagecut.frontend.lower.from_export import lower_export
from stagecut.frontend.lower.from_fx import lower_graph_module
from stagecut.frontend.lower.lower import returns_what_it_is_given
from stagecut.frontend.markers import SplitPoint
from stagecut.frontend.policy import Cuts, as_cuts, takes_graph
from stagecut.frontend.source import at_users_lines, place_of
from stagecut.garbage import collected_seldom
from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.counted import count_names
from stagecut.ir.errors import (
    CaptureError,
    InputError,
    SplitError,
    StagecutError,
    nearest,
    wrong_kind,
)
from stagecut.ir.graph import BY_MODE, Program, scope_fqn
from stagecut.ir.keywords import near_names, near_names_in, near_names_or
from stagecut.ir.roles import Budget, Roles
from stagecut.ir.run.attention import Masks
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.call import check_inputs
from stagecut.ir.run.held import Held
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.base import Pass
from stagecut.passes.causal_attention import CausalAttention
from stagecut.passes.find_splits import BEGINNING, END, FindSplits
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.recompute import Recompute
from stagecut.passes.route import Route
from stagecut.passes.runner import run_passes
from stagecut.passes.share_state import EVERY, REPLICATE, TRANSMIT, ShareState
from stagecut.piped import PipedModel, data_of
from stagecut.repeat import changing
from stagecut.unwrapped import COMPILED, unwrapped

if TYPE_CHECKING:
    from stagecut.backend.costs.measured import Trial
    from stagecut.backend.costs.plan import Plan
    from stagecut.backend.costs.report import Report as StageCosts
    from stagecut.backend.costs.setting import Setting
    from stagecut.backend.costs.timeline import Timeline
    from stagecut.backend.pictures.summary import Summary
    from stagecut.backend.ranks.stage import BuiltStage, PipeInfo
    from stagecut.backend.ranks.wrapped import Wrap

CHECKS = ("auto", "outputs", "gradients", None)
Model = nn.Module | ExportedProgram | fx.GraphModule


SEARCHED = {
    "split_policy=Balanced(stages, Setting({}=...))": (
        "device", "schedule", "n_microbatches", "training", "optimizer", "ranks", "backward", "compile",
        "recompute", "activation_budget",
    ),
    "split_policy=Balanced(stages, {}=...)": (
        "setting", "pins", "tolerance", "budget", "profile_on", "inside", "loss_fn", "target", "wrap",
        "order",
    ),
}  # fmt: skip
"""Where an argument of a search of cuts goes -> the names of such arguments."""

OF_SEARCH = {
    name: where.format(name) for where, names in SEARCHED.items() for name in names
}


@near_names_or(OF_SEARCH)
def pipeline(
    module: Model,
    mb_args: tuple[Any, ...] | None = None,
    mb_kwargs: dict[str, Any] | None = None,
    split_spec: dict[str, SplitPoint] | None = None,
    split_policy: Callable[..., Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    stages: int | None = None,
    leaf_modules: Sequence[str] = (),
    routes: Mapping[str, str] | None = None,
    tied: str | Mapping[str, str] = "replicate",
    check: str | None = "auto",
    fold: bool = True,
) -> Pipe:
    """Cuts `module` into pipeline stages.

    Arguments
    ---------
    module: the model, or its `torch.export.ExportedProgram` or `torch.fx.GraphModule`. It is not changed. One
        that `torch.compile` returned is cut as it was written, under the names that it had before.
    mb_args, mb_kwargs: example inputs, the size of one micro-batch. An ExportedProgram needs none.
    split_spec: module path -> SplitPoint; cuts before or after every call of that module.
    split_policy: a function that takes the traced `fx.GraphModule` and returns it with `pipe_split` calls
        added, or one with a parameter that is named `program` or annotated as `Program`, which takes the
        Program and returns the positions of ops in front of which to cut.
        `Balanced(stages, Setting(device=..., schedule=...))` finds the cuts by predicted times and memory.
    stages: cut into so many stages, as `Balanced(stages)` does but without a limit for memory. `pipe.plan`
        holds the result.
    dynamic_shapes: sizes that may vary, as for `torch.export.export`.
    leaf_modules: paths of modules to keep whole: each call is one op that calls the user's own module object.
        Where tracing fails inside a submodule, the smallest one around the failing line is kept whole
        automatically; `pipe.notes` says so. The sizes of the tensors it returns, and the numbers among them,
        are those of the example: a call in which they differ raises.
    routes: name of a value, as `print(pipe.ir())` shows it -> 'recompute' (the stages that read it compute it
        themselves) or 'relay' (it is sent from stage to stage; an input of the model from the first stage
        on). For a value that is not named, the cheaper way is taken, and 'recompute' only where no gradient
        flows, so that gradients stay bit for bit the model's.
    tied: how several stages share a parameter that all of them read, for all parameters or by name:
        'replicate' (each stage has a copy, and the gradients are summed before the optimizer's step) or
        'transmit' (the first stage has it, and sends it on as a value).
    check: what to compare with the model afterwards, by one run of both on copies with the example inputs:
        'outputs', 'gradients' (outputs, gradients, state, names), or None. 'auto', the default, means
        'gradients' when the model is real and its state no larger than CHECK_BYTES, else None. Where the
        stages hold two modes that were traced separately, both are compared.
    fold: trace a block that the model repeats, such as a layer of a decoder, twice, and take the same steps
        for its further calls that are traced alike. The program is the same, letter for letter, as with
        False, which traces each call. A `split_policy` that edits the traced GraphModule is given all of it:
        then each call is traced.

    Afterwards the pipe's stages compute what `module` computes, forward and backward, under its names, and
    hold its own tensors. A boundary with nothing before or after it is dropped: no stage is empty.

    Raises
    ------
    InputError: the example inputs do not fit the model's signature.
    CaptureError: the model cannot be traced, or fails on the example inputs; the message names the source
        line, and `error.cause` is the exception of torch's or of the model's that says so.
    CheckError: the pipe does not compute what the model computes: tracing lost something.
    SplitError: a split point names no module that runs, or lies inside something that cannot be divided.
    """
    if check not in CHECKS:
        raise InputError(
            f"check={check!r} is not known",
            hint="one of " + ", ".join(map(repr, CHECKS)),
        )
    _refuse_wrong_kinds(
        split_spec=(split_spec, Mapping, '{"layers.4": SplitPoint.BEGINNING}'),
        split_policy=(split_policy, Callable, "a function, or Balanced(stages)"),
        stages=(stages, int, "a whole number, such as 2"),
        routes=(routes, Mapping, '{"mask": "recompute"}'),
        tied=(tied, str | Mapping, '"transmit", or {"head.weight": "transmit"}'),
    )
    leaf_modules = _paths(leaf_modules)
    given = module
    module = unwrapped(given)
    if isinstance(split_policy, type):
        raise InputError(
            f"split_policy={split_policy.__name__} is a class",
            hint=f"split_policy={split_policy.__name__}(stages)",
        )
    _refuse_two_wishes(
        {"stages": stages, "split_spec": split_spec, "split_policy": split_policy}
    )
    at = _split_points(split_spec or {}, module)
    searched = _searched(split_policy, stages)
    passes = [*_chosen_passes(routes or {}, tied)]

    def compiled(one_mode: str = "") -> Pipe:
        with doing(f"tracing {type(module).__name__}"):
            program, bindings, exported = lower(
                module,
                mb_args,
                mb_kwargs,
                dynamic_shapes,
                leaf_modules,
                [name for name, _ in at],
                one_mode,
                fold=fold and not takes_graph(split_policy),
            )
        trace = Trace(program)
        plans: list[Plan] = []
        in_vain = ""
        try:
            policy = _policy(
                searched,
                exported,
                plans,
                lambda: _sizes_of(program, bindings, mb_args, mb_kwargs),
                bindings,
                lambda: _trial(program, bindings, mb_args, mb_kwargs),
            )
            splits = FindSplits(at, policy, _other_names(module), bindings.whole)
            with doing(f"cutting {program.name}, {len(program.ops)} ops"):
                run_passes(program, default_pipeline(splits, *passes))
        except SplitError as error:
            if one_mode or not any(
                op.target == BY_MODE or returns_what_it_is_given(op)
                for op in program.all_ops()
            ):
                raise
            in_vain = f"both modes together cannot be cut so: {error.what}"
        if in_vain:
            # here, so that an error of it is one, and not a second one
            return compiled(in_vain)
        validate(trace, program)
        pipe = Pipe(program, bindings)
        pipe.plan = plans[0] if plans else None
        if isinstance(module, nn.Module):
            pipe._held = _held(module, pipe, bindings)
        return pipe

    with collected_seldom():
        pipe = compiled()
    pipe.traced_under = _autocasts()
    if isinstance(module, nn.Module):
        pipe._model = weakref.ref(module)
        if all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            # it weighs nothing, and stages that become real ask it for names and values
            pipe._model = lambda: module
        pipe._data = data_of(module)
        pipe._built = sampled(pipe.program, pipe.stages)
        if module is not given:
            pipe.notes += (COMPILED,)
        pipe._sizes = check_inputs(
            pipe.program.inputs, pipe.flatten(mb_args or (), mb_kwargs or {})
        )
        with doing("comparing the stages with the model"):
            _check(module, pipe, tuple(mb_args or ()), mb_kwargs or {}, check)
    return pipe


def _held(module: nn.Module, pipe: Pipe, bindings: Bindings) -> Held:
    """What the stages hold of a model."""
    return Held(
        module,
        {id(parameter) for parameter in pipe.parameters()},
        {id(called) for called in bindings.modules.values()},
        {scope_fqn(op.scope) for op in pipe.program.all_ops()},
    )


def _refuse_wrong_kinds(**given: tuple[Any, Any, str]) -> None:
    """Returns when each argument is None or of its kind. An argument comes with its kind, and with an
    example.
    """
    for name, (value, kind, example) in given.items():
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not fits:
            raise InputError(
                wrong_kind(name, value),
                hint=f"{name}={example}",
            )


def _paths(leaf_modules: Any) -> tuple[str, ...]:
    """The paths of modules to keep whole. Raises InputError for what is no list of paths."""
    if isinstance(leaf_modules, str) or not isinstance(leaf_modules, Iterable):
        raise InputError(
            f"leaf_modules={leaf_modules!r} is no list of paths",
            hint=f"leaf_modules=[{leaf_modules!r}]",
        )
    paths = tuple(leaf_modules)
    for path in paths:
        if not isinstance(path, str):
            raise InputError(
                f"leaf_modules holds a {type(path).__name__}, and no path",
                hint='the names of modules, as named_modules() has them: leaf_modules=["layers.4"]',
            )
    return paths


def _autocasts() -> dict[str, torch.dtype]:
    """Device type -> the dtype of the autocast that is on."""
    return {
        kind: torch.get_autocast_dtype(kind)
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    }


def _refuse_two_wishes(wishes: Mapping[str, Any]) -> None:
    """Returns when at most one of the arguments that say where to cut is given."""
    names = [f"{name}=" for name, wish in wishes.items() if wish is not None]
    if len(names) > 1:
        hint = (
            "split_policy=Balanced(stages, ...)"
            if "split_spec=" not in names
            else "give one of them"
        )
        raise InputError(f"{' and '.join(names)} both say where to cut", hint=hint)


def _searched(
    policy: Callable[..., Any] | None, stages: int | None
) -> Callable[..., Any] | None:
    """The policy, or one for so many stages. Raises InputError and SplitError for what is wrong with it
    whatever the program is: a trace may take minutes.
    """
    if stages is not None:
        from stagecut.backend.costs.balance import Balanced

        policy = Balanced(stages, budget=math.inf)
    refuse_wrong = getattr(policy, "refuse_wrong", None)
    if refuse_wrong is not None:
        refuse_wrong()
    return policy


def _policy(
    chosen: Callable[..., Any] | None,
    exported: ExportedProgram | None,
    plans: list[Plan],
    sizes: Callable[[], dict[str, int]],
    bindings: Bindings,
    trial: Callable[[], Trial],
) -> Cuts | None:
    """The policy that chooses the cuts. Where it searches for them, `plans` gains the result."""
    if chosen is None:
        return None
    if not hasattr(chosen, "plan"):
        return as_cuts(chosen, exported)
    from stagecut.backend.costs.balance import Balanced
    from stagecut.backend.costs.shared import shared_plan

    balanced: Any = chosen

    def cuts(program: Program) -> list[int]:
        def search() -> Plan:
            known = [sizes(), bindings]
            if getattr(balanced, "needs_trial", False):
                known.append(trial())
            found: Plan = balanced.plan(program, *known)
            return found

        ours = isinstance(balanced, Balanced)
        plans.append(shared_plan(program, balanced, search) if ours else search())
        return list(plans[0].cuts)

    return cuts


def cut_copy(
    traced: str, bindings: Bindings, positions: Sequence[int], recompute: bool = True
) -> Pipe:
    """A copy of a program, cut in front of these ops. `traced` is its text at the time when the cuts are
    searched.
    """
    copy = parse(traced)
    passes = default_pipeline(FindSplits((), lambda _: positions))
    names = [each.name for each in passes]
    rest = passes[names.index(FindSplits.name) :]
    run_passes(copy, [p for p in rest if recompute or not isinstance(p, Recompute)])
    return Pipe(copy, bindings)


def _trial(program: Program, bindings: Bindings, args: Any, kwargs: Any) -> Trial:
    """Cuts copies of the program as it is when the cuts are searched, to time their stages."""
    from stagecut.backend.costs.measured import Trial

    traced = text(program)

    def cut(positions: Sequence[int]) -> Staged:
        # what each stage would compute again would be timed in each
        return cut_copy(traced, bindings, positions, recompute=False)

    flat: list[Any] = []
    if bindings.call is not None:
        flat = bindings.call.flatten(tuple(args or ()), dict(kwargs or {}))
    return Trial(cut, flat)


def _sizes_of(
    program: Program,
    bindings: Bindings,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any] | None,
) -> dict[str, int]:
    """The symbolic sizes in a call."""
    if bindings.call is None or (args is None and kwargs is None):
        return {}
    return check_inputs(program.inputs, bindings.call.flatten(args or (), kwargs or {}))


def lower(
    module: Model,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any] | None,
    dynamic_shapes: Any = None,
    leaf_modules: Sequence[str] = (),
    asked: Iterable[str] = (),
    one_mode: str = "",
    batches: bool = True,
    fold: bool = True,
    grad: bool = True,
) -> tuple[Program, Bindings, ExportedProgram | None]:
    """The traced program of `module`, its bindings, and the exported program where there was one.

    The program does what the module does in train and in eval mode, as far as possible, or in its present
    mode alone, for a reason in `one_mode`. The module is cut at the modules in `asked`. With `batches`, the
    program says where its batch is. With `fold`, a block that the model repeats is traced once for all calls
    that are alike, and the exported program has not the nodes of each. Code that asks whether gradients are
    on takes the path that `grad` says. What torch.compile made of the module does not count.
    """
    try:
        with collected_seldom():
            program, bindings, exported = _lowered(
                module,
                args,
                kwargs,
                dynamic_shapes,
                leaf_modules,
                asked,
                one_mode,
                fold,
                grad,
            )
    except StagecutError as error:
        raise at_users_lines(error) from None
    count_names(program)
    if not batches:
        return program, bindings, exported
    with as_written(module):
        mark_batches(
            program,
            module if isinstance(module, nn.Module) else None,
            bindings.call,
            tuple(args or ()),
            kwargs or {},
            exported,
            isinstance(module, nn.Module) and is_cheap(module, (args, kwargs)),
            fold,
        )
    unmasked = CausalAttention(Masks(program, bindings).kind).unmasked(program)
    if unmasked:
        why = "which hides just the future, or nothing"
        bindings.notes.append(
            f"{len(unmasked)} attentions run without their mask, {why}: the first at {unmasked[0].where()}"
        )
    return program, bindings, exported


def _lowered(
    module: Model,
    args: tuple[Any, ...] | None,
    kwargs: dict[str, Any] | None,
    dynamic_shapes: Any,
    leaf_modules: Sequence[str],
    asked: Iterable[str],
    one_mode: str,
    fold: bool,
    grad: bool,
) -> tuple[Program, Bindings, ExportedProgram | None]:
    if isinstance(module, ExportedProgram):
        return *lower_export(module), module
    if args is None and kwargs is None:
        raise InputError(
            "example inputs are needed to trace a module",
            hint="pass mb_args=(x, ...) and/or mb_kwargs={...}",
        )
    check_containers(args, kwargs)
    if isinstance(module, fx.GraphModule):
        return *lower_graph_module(module, tuple(args or ()), kwargs or {}), None
    if not isinstance(module, nn.Module):
        raise _no_module(module)
    args, kwargs = () if args is None else args, {} if kwargs is None else kwargs
    eager = EagerPath(module)
    exported, leaves = capture(
        module, args, kwargs, dynamic_shapes, leaf_modules, eager, fold, grad
    )
    program, bindings = lower_export(exported, module, leaves.calls)
    bindings.attributes_read += leaves.attributes_read

    def again() -> tuple[Program, Bindings]:
        # by the same paths: only modes differ
        exported_again, leaves_again = capture(
            module, args, kwargs, dynamic_shapes, leaves.paths, eager, fold, grad
        )
        for path in leaves_again.paths:
            if path not in leaves.paths:
                raise CaptureError(
                    f"module '{path}' would have to be kept whole, as by leaf_modules=['{path}']",
                    where=leaves_again.reasons.get(path, ""),
                )
        leaves.trace_notes += [
            note for note in leaves_again.trace_notes if note not in leaves.trace_notes
        ]
        known = {(each.path, each.name) for each in bindings.attributes_read}
        bindings.attributes_read += [
            each
            for each in leaves_again.attributes_read
            if (each.path, each.name) not in known
        ]
        return lower_export(exported_again, module, leaves_again.calls)

    if one_mode:
        hold_one_mode((program, bindings), one_mode)
    else:
        follow(module, (program, bindings), again, asked)
    for path, extra in _extras(module).items():
        bindings.learn(path, extra=extra)
    bindings.whole = leaves.reasons
    bindings.notes = [
        *leaves.notes,
        *(
            f"the stages keep the extra state that module '{path}' has at the cut"
            for path in bindings.extras
        ),
    ]
    return program, bindings, exported


def _no_module(given: Any) -> InputError:
    """The error for what is no model, with what may have been meant."""
    name = type(given).__name__
    hint = "the model itself, an nn.Module whose forward is to be cut"
    if isinstance(given, type):
        name = f"the class {given.__name__}"
        hint = f"make the module first: {given.__name__}(...)"
    elif isinstance(given, str | Path):
        hint = "from_pretrained(FOLDER, ...) cuts a model in files, load(FOLDER) loads a saved pipe"
    elif isinstance(given, list | tuple):
        hint = "nn.Sequential(*layers)"
    elif callable(given):
        hint = "a class derived from nn.Module, whose forward calls it and whose attributes are its modules"
    return InputError(
        f"expected an nn.Module, an ExportedProgram or an fx.GraphModule, not {name}",
        hint=hint,
    )


def _extras(module: nn.Module) -> dict[str, tuple[Any, str]]:
    """Module path -> its extra state, and where its class makes it."""
    extras: dict[str, tuple[Any, str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        get = type(owner).get_extra_state
        if get is not nn.Module.get_extra_state:
            code = get.__code__
            place = f"{code.co_filename}:{code.co_firstlineno}, {get.__qualname__}"
            extras[path] = (owner.get_extra_state(), place)
    return extras


def _check(
    module: nn.Module,
    pipe: Pipe,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    check: str | None,
) -> None:
    if check is None or (check == "auto" and not is_cheap(module, (args, kwargs))):
        return
    if not is_real(module, (args, kwargs)):
        raise CannotCompare(
            f"{type(module).__name__} has tensors without values, on the meta device",
            hint="check=None",
        )
    modes = (
        (False, True)
        if holds_both_modes(pipe.program)
        and not any(stage.holds_one_mode for stage in pipe.stages)
        else (False,)
    )
    for switched in modes:
        try:
            report = compare(
                module,
                pipe,
                args,
                kwargs,
                gradients=check != "outputs",
                switched=switched,
            )
        except CannotCompare as error:
            if error.cause is not None and not switched:
                _refuse_failing(module, pipe, args, kwargs)
            if check != "auto":
                raise
            pipe.notes += (
                f"not compared with the model{_mode(pipe, switched)}: {error}\n"
                "  try: compare a call of the pipe with one of the model; check=None where it is known",
            )
            continue
        if not report.ok:
            raise _difference(module, pipe, args, kwargs, report, switched)


def _refuse_failing(
    module: nn.Module, pipe: Pipe, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raises CaptureError where neither the model nor the pipe can run on the example inputs."""
    failure = failure_on(module, pipe, args, kwargs)
    if failure is None:
        return
    otherwise = (
        "; check=None where only the sizes of the inputs are meant: calls with inputs that fail here fail in "
        "the pipe too"
    )
    raise at_users_lines(failing_on_example(type(module), failure, otherwise)) from None


def _mode(pipe: Pipe, switched: bool) -> str:
    """The mode of the comparison, as text, where it is not that of the cut."""
    return f" in {'eval' if pipe.training else 'train'} mode" if switched else ""


def _difference(
    module: nn.Module,
    pipe: Pipe,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    report: Report,
    switched: bool,
) -> CheckError:
    path = changing(module, args, kwargs)
    if path is not None:
        place = place_of(type(module.get_submodule(path)))
        return CheckError(
            f"{type(module).__name__} computes something else in each call, and the stages would not: what "
            "goes in is more than its "
            "inputs, parameters, buffers and torch's random numbers",
            where=f"{place}, module '{path}'" if path else place,
            hint="make it a buffer (register_buffer, changed in place) or an input",
        )
    return CheckError(
        f"the pipe does not compute what the model computes{_mode(pipe, switched)}: {report.differences[0]}",
        where=f"{len(report.differences)} difference(s) in one run on the example inputs",
        hint="keep the module that computes it whole: leaf_modules=[...]; "
        "pipe = pipeline(..., check=None); print(pipe.verify(...)) lists all differences",
    )


def _chosen_passes(
    routes: Mapping[str, str], tied: str | Mapping[str, str]
) -> Iterator[Pass]:
    """The passes with the user's choices for them."""
    yield Recompute(tuple(routes.items()))
    yield Route(tuple(name for name, route in routes.items() if route == "relay"))
    if tied is None:
        raise InputError(
            "tied=None is not known", hint=nearest("", [REPLICATE, TRANSMIT])
        )
    by_name = {EVERY: tied} if isinstance(tied, str) else dict(tied)
    for sharing in by_name.values():
        if sharing not in (REPLICATE, TRANSMIT):
            raise InputError(
                f"tied={sharing!r} is not known",
                hint=nearest(sharing, [REPLICATE, TRANSMIT]),
            )
    yield ShareState(
        tuple(name for name, sharing in by_name.items() if sharing == TRANSMIT)
    )


def _split_points(
    spec: Mapping[str, SplitPoint], module: Model
) -> tuple[tuple[str, str], ...]:
    paths: list[str] = []
    if isinstance(module, nn.Module):
        modules = module.named_modules(remove_duplicate=False)
        paths = [path for path, _ in modules if path]
    points = []
    for name, point in spec.items():
        if not isinstance(name, str):
            raise SplitError(
                f"split_spec names {name!r}, which is no path of a module",
                hint='a path such as "layers.4"',
            )
        if paths and name not in paths:
            raise SplitError(
                f"split_spec names module '{name}', which the model does not have",
                hint=nearest(name, paths),
            )
        # the SplitPoint of torch.distributed.pipelining is accepted too
        if not isinstance(point, Enum) or type(point).__name__ != "SplitPoint":
            raise SplitError(
                f"split_spec['{name}'] is {point!r}, not a SplitPoint",
                hint="SplitPoint.BEGINNING or SplitPoint.END",
            )
        points.append((name, BEGINNING if point.name == "BEGINNING" else END))
    return tuple(points)


def _other_names(module: Model) -> dict[str, list[str]]:
    """Module path -> the other paths of the same module. A trace may name a call by any of them."""
    names: dict[int, list[str]] = {}
    if isinstance(module, nn.Module):
        for name, owner in module.named_modules(remove_duplicate=False):
            names.setdefault(id(owner), []).append(name)
    others: dict[str, list[str]] = {}
    for group in names.values():
        if len(group) > 1:
            others |= {
                name: [other for other in group if other != name] for name in group
            }
    return others


@near_names_in
class Pipe(Staged):
    """A model cut into stages, as `pipeline`, `from_pretrained` and `load` make it. Called with the model's
    own arguments, it runs the stages one after the other. It can be compared with the model, costed, saved,
    drawn, and run on ranks by a Driver. Its modules and tensors have the model's names.

    program: the linked program; `ir()` is its text. stages: the modules of the stages, in order. notes: what
    tracing could not do exactly or fast, and why, in sentences; one that asks for something has a line
    `try:`. plan: the cuts of a search with their
    predicted costs; None where the cuts were not searched. The stages are made from the program and
    `bindings`, the real objects behind its names.
    """

    plan: Plan | None
    _data: Mapping[str, Any] = {}
    """The attributes of the model that are data. They are of the user's classes, so no pickle has them."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_data", None)
        return state

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        """The summary and the stage graph, for a notebook; without the graph where no program that draws is
        installed.
        """
        from stagecut.backend.pictures.render import find_renderer

        picture = "" if find_renderer() is None else self.to_svg()
        return self.summary().to_html(picture)

    def summary(self) -> Summary:
        """The stages on one screen: the modules they run, parameters, bytes that cross, tied state, and for
        which devices and schedule the cuts were searched. `print` the pipe to see it; a notebook adds the
        picture.
        """
        from stagecut.backend.pictures.summary import summary

        mode = "train" if self.training else "eval"
        basis = self.plan.basis if self.plan is not None else ()
        return summary(self.program, mode, self.notes, basis)

    def verify(self, *args: Any, **kwargs: Any) -> Report:
        """Runs the original model and the pipe on the same arguments, in the mode that the pipe is in, and
        compares them.

        Compares outputs, gradients of all parameters and inputs, state afterwards, and names. Both run on
        copies: neither the model nor the pipe nor the random state changes. Raises StagecutError when the
        original model is gone or cannot be copied, and InputError for arguments that do not fit the trace.
        """
        model = self._model() if self._model is not None else None
        if model is None:
            raise StagecutError(
                "there is no model to compare with",
                hint="keep the model alive; an ExportedProgram has none",
            )
        self.flatten(args, kwargs)
        return compare(model, self, args, kwargs)

    def report(
        self,
        setting: Setting | None = None,
        *,
        profile_on: torch.device | str | None = None,
        wrap: Wrap = None,
        loss_fn: Callable[..., Any] | None = None,
        target: Any = None,
    ) -> StageCosts:
        """The predicted costs of the stages: time, memory by kind, each crossing with its route and the
        reason, the bubble, the speed-up. `print` it for a table; it has `to_json()` and `to_svg()`.

        setting: on which devices and by which schedule the stages run; by default that of the search, where
            the cuts were searched.
        profile_on: a torch device on which stages are timed instead of estimated, in the form that `wrap`
            gives to them, as for Driver.
        loss_fn, target: the loss of the last stage, and an example of its target for one micro-batch; without
            one, cross-entropy counts where the model returns logits.

        Raises InputError for a setting that does not fit the stages, or a device that is not there.
        """
        from stagecut.backend.costs.kept import kept_by_graphs
        from stagecut.backend.costs.loss import counted_loss
        from stagecut.backend.costs.measured import measure, torch_device
        from stagecut.backend.costs.report import bindings_of, report
        from stagecut.backend.costs.setting import Setting
        from stagecut.backend.costs.way import Way

        program = self.program
        chosen = setting or (self.plan.setting if self.plan else Setting())
        if not isinstance(chosen, Setting):
            raise InputError(
                wrong_kind("setting", chosen),
                hint='a Setting, such as Setting(device="H100"); pages and pictures are returned as text: '
                "Path(name).write_text(pipe.to_html())",
            )
        chosen.refuse_backward()
        loss = counted_loss(
            program, self._call_spec, self._sizes, chosen, loss_fn, target
        )
        seconds = None
        if profile_on is not None:
            way = Way.before(loss, torch_device(profile_on), wrap, chosen)
            indices = range(self.num_stages)
            with doing(f"timing the stages on {profile_on}"):
                seconds = [measure(self, i, way, self._sizes) for i in indices]
        saved = kept_by_graphs(self, chosen, self._sizes) if chosen.by_graphs else ()
        return report(
            program,
            chosen,
            self.plan,
            self._sizes,
            bindings_of(self),
            loss,
            seconds,
            wrap is None,
            saved,
        )

    def materialize(
        self,
        stages: int | Iterable[int],
        source: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        init_fn: Callable[[nn.Module], Any] | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
        rename: Callable[[str], str] | None = None,
        cast: bool = False,
        seed: int = 0,
    ) -> None:
        """These stages are real and on `device`; the others are as before. For a model that was cut on the
        meta device.

        A tensor gets its value from the first of these that has one:

        values: tensors by the model's names. A value that the stage has already stays when there is none here
            and none in the source.
        source: a checkpoint that has every persistent tensor; no other checkpoint is read. It is a
            .safetensors file, a folder with `model.safetensors` or `model.safetensors.index.json`, or a
            checkpoint of torch.distributed.checkpoint. Names and forms that transformers has for the files of
            a model of its own are converted, while the model is alive. `rename` gives the name in the
            checkpoint for a name of the model instead. With `cast`, floats of another dtype become the
            model's.
        init_fn: called with every module of a copy of the model in which the tensors to initialise are real,
            inner modules first, such as `lambda m: m.reset_parameters() if hasattr(m, "reset_parameters")
            else None` or `model._init_weights`. With a source, it only sets what no checkpoint holds: buffers
            that are not persistent; by default the model's own code does, as for `initialize`. Random numbers
            depend on `seed` and the tensor's name, not on the cut.

        Tied names are one Parameter, on all stages of this process. The dtype is the one that was traced. A
        module kept whole is the model's own, and becomes real in the model too.

        Raises MaterializeError for a tensor without a value from any of these, CheckpointError for one that
        the source lacks or has in another shape or dtype. No stage has changed then.
        """
        from stagecut.backend.files.materialize import materialize
        from stagecut.backend.pictures.drawing import stages_text

        chosen = _indices(stages)
        with doing(f"making {stages_text(chosen)} real"):
            materialize(
                self,
                chosen,
                source,
                _real_device(device),
                init_fn,
                values or {},
                rename,
                cast,
                seed,
            )

    def initialize(
        self,
        stages: int | Iterable[int],
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """These stages have the values of a new model: its own code has set all parameters and buffers, those
        that are not persistent too. Stages on meta are real and on `device`; a sharded parameter has its
        shard.

        For each module, inner ones first, `_init_weights` of the nearest module around it is called with it;
        where there is none, or it leaves tensors of the module as they are, the module's own
        `reset_parameters`, `_reset_parameters` or `init_weights`.

        The values are, bit for bit, those of the whole model on `device` for which all this was called after
        `torch.manual_seed(seed)`, however the model is cut. So each rank runs this for the whole model, and
        has memory for one foreign module at a time. The random state stays as it was.

        Raises MaterializeError for a tensor that no code sets. No stage has changed then.
        """
        from stagecut.backend.files.materialize import initialize
        from stagecut.backend.pictures.drawing import stages_text

        chosen = _indices(stages)
        with doing(f"initialising {stages_text(chosen)}"):
            initialize(self, chosen, _real_device(device), seed)

    def save(self, folder: str | Path, stages: Iterable[int] | None = None) -> None:
        """`folder` holds the pipe: IR text, tensors, and the calling convention of the model.
        `stagecut.load(folder)` restores it.

        The folder appears whole or not at all. With `stages`, only those are saved, beside those that other
        ranks save of the same pipe to the same folder; the others may be on meta. Raises SavedError for what
        no file can hold: modules kept whole, functions of yours.
        """
        from stagecut.backend.files.saved import save

        with doing(f"saving to {folder}"):
            save(self, folder, stages)

    def build_stage(
        self, stage_index: int, device: torch.device | str, group: Any = None
    ) -> BuiltStage:
        """Stage `stage_index` as a `torch.distributed.pipelining.PipelineStage` on `device`, for any of
        torch's schedules. `group` has the ranks that run the stages; None for all.

        The first stage takes the model's own arguments and hands on the values that later stages need; the
        last returns the model's output tensors in order. Raises StagecutError for a stage that there is not,
        for a value that cannot cross between processes, and where there is no process group.
        """
        from stagecut.backend.ranks.stage import make_stage

        return make_stage(
            self, stage_index, torch.device(device), group, self._sizes, False
        )

    @property
    def split_gm(self) -> fx.GraphModule:
        """The stages as torch's frontend lays them out: children `submod_pp_0` and so on of a graph that
        calls them on flat inputs.
        """
        return split_module(self.program, self.stages)

    @property
    def replicated_params(self) -> list[dict[str, str]]:
        """For each parameter of several stages: the stage, as `split_gm` calls it -> the parameter's name
        there.

        Each of them gets the gradient of its own stage. Where they are on several ranks, the caller has to
        sum the gradients.
        """
        shared = [
            entry
            for entry in self.program.state
            if entry.kind == "param" and len(entry.stages) > 1
        ]
        return [
            {
                f"{PREFIX}{stage}": self.program.stages[stage].state[entry][0]
                for stage in entry.stages
            }
            for entry in shared
        ]

    def print_readable(self) -> None:
        """Prints the calls of the stages, and every stage as Python."""
        print(  # noqa: T201 what the method is for
            self.split_gm.code.strip(),
            *(stage.code for stage in self.stages),
            sep="\n\n",
        )

    def info(self) -> PipeInfo:
        """The part of the pipe that `stagecut.build_stage` needs beside a stage."""
        from stagecut.backend.ranks.stage import PipeInfo

        return PipeInfo(self)

    def joint_graph(
        self,
        function: Callable[..., tuple[torch.Tensor, ...]],
        arguments: Sequence[torch.Tensor],
    ) -> Any:
        """A function of these arguments and its gradients, traced together, as `roles` takes it. Raises
        CaptureError.
        """
        from stagecut.frontend.capture.joint import joint_graph

        with doing("tracing the backward of a stage"):
            return joint_graph(function, arguments)

    def roles(
        self,
        traced: Any,
        names: Sequence[str],
        weights: Collection[int],
        same: Mapping[int, int],
        resident: Collection[int],
        recompute: bool | Budget = False,
    ) -> tuple[Roles, Bindings]:
        """The roles of a traced function: its forward, the gradients of its inputs, those of its weights; and
        the constants that they read.

        names: those of its arguments. weights: the places of the arguments whose gradients may come last.
        same: the place of a result -> that of the argument which it is a copy of, and which the forward
        returns instead. resident: the places of the arguments that lie in memory whatever is saved.
        recompute: whether the backward computes ops again, so that less is saved.
        """
        from stagecut.frontend.lower.from_joint import lower_joint
        from stagecut.ir.run.flops import flops_of
        from stagecut.passes.roles import skip_views, split

        graph, tangents = traced
        joint, bindings = lower_joint(graph, names, tangents, weights, resident)
        skip_views(joint.block)
        outputs = list(joint.block.outputs)
        for result, argument in same.items():
            outputs[result] = joint.primals[argument]
        joint.block.set_outputs(outputs)
        return split(joint, recompute, flops_of), bindings

    def differentiated(
        self, recompute: bool | Budget = False
    ) -> tuple[Program, Bindings]:
        """The program with a backward for each stage, in the mode that the pipe is in, and the constants that
        it reads besides. The ops of its stages are those that autograd sees. `print(program)` shows the three
        roles of each stage, the values saved between them, and the gradients that cross. With `recompute`,
        the backward computes light ops again, so that less is saved; with a Budget, what fits it.

        Raises RolesError where the backward of a stage cannot be in the program.
        """
        from stagecut.differentiate import differentiated

        return differentiated(self, recompute)

    def module(self) -> PipedModel:
        """The pipe as a module with the model's own signature and output structure. Attributes of the model
        that are data, such as `config`, are attributes of it; `device` and `dtype` are those of the stages.
        A pipe that was copied, pickled or loaded knows no data of the model.
        """
        return PipedModel(self, self._data)

    def to_dot(self) -> str:
        """The stage graph in the DOT language, as `stagecut.to_dot` describes it."""
        from stagecut.backend.pictures.dot import to_dot

        return to_dot(self.program)

    def to_svg(
        self,
        *,
        level: str = "stages",
        stage: int | None = None,
        depth: int | None = None,
        renderer: str | None = None,
    ) -> str:
        """A picture of the stages, of the modules of one, or of its ops, as SVG.

        level, stage, depth: what is drawn, as for `stagecut.to_dot`. renderer: the program that draws, as for
        `stagecut.to_svg`. Raises InputError for an unknown level or stage, and StagecutError where no such
        program is installed.
        """
        from stagecut.backend.pictures.dot import to_svg

        return to_svg(
            self.program, level=level, stage=stage, depth=depth, renderer=renderer
        )

    def to_html(
        self,
        setting: Setting | None = None,
        *,
        measured: Timeline | None = None,
        against: Pipe | None = None,
        source: bool = True,
    ) -> str:
        """One page with all that is known of the pipe: costs under `setting` as in `report`, the timeline of
        a step, the stage graph, the program, and the life of every value. It needs no other file.

        measured: the timeline of a step that `record` measured; the page shows it below the predicted one.
        against: another pipe of the same model; the page shows both cuts, under the same setting.
        source: whether the page has the lines of Python that ops come from, where they can be read.
        """
        from stagecut.backend.page.page import to_html
        from stagecut.backend.pictures.render import find_renderer

        graph = self.to_svg() if find_renderer() else None
        other = None
        if against is not None:
            other = against.program, against.report(setting)
        return to_html(
            [("cut", self.ir(), 0.0)],
            self.program,
            self.report(setting),
            graph_svg=graph,
            title=self.program.name,
            measured=measured,
            against=other,
            source=source,
        )


def _indices(stages: int | Iterable[int]) -> list[int]:
    """The indices of stages. Raises InputError for what is none."""
    chosen = [stages] if isinstance(stages, int) else stages
    if not isinstance(chosen, Iterable):
        raise InputError(f"{stages!r} is no stage", hint=_INDICES)
    chosen = list(chosen)
    if wrong := [index for index in chosen if not isinstance(index, int)]:
        raise InputError(f"{wrong[0]!r} is no stage", hint=_INDICES)
    return chosen


def _real_device(device: torch.device | str) -> torch.device:
    """A device on which tensors have values. Raises InputError for meta."""
    chosen = torch.device(device)
    if chosen.type == "meta":
        raise InputError(
            "nothing is real on the meta device", hint='device="cpu", or driver.device'
        )
    return chosen


_INDICES = "the indices of stages, such as 0 or [0, 3]"


@near_names
def load(
    folder: str | Path,
    stages: Iterable[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    ops: Collection[str] = (),
) -> Pipe:
    """The pipe that was saved in `folder`, on `device`. With `stages`, only those are read and real; the
    others are on meta.

    It computes bit for bit what the saved one computed, and its state has the same names, order, modes and
    ties. No code of the folder is run, and nothing is imported: classes of arguments and outputs must be
    imported before. `ops` are namespaces of operators of yours, as in `torch.ops.NAMESPACE`, that the program
    may call. Hooks, the plan of a search, and the model for `pipe.verify` are not kept.

    Raises SavedError for a folder that is damaged, incomplete, or of a newer format.
    """
    from stagecut.backend.files.saved import restored

    with doing(f"loading {folder}"):
        return restored(Pipe, folder, stages, device, ops)
