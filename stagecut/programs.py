"""The programs of one model for calls of several kinds, all cut at the same places: the prefill of a decoder,
its decode step.

A call that fits no program is traced. Where it differs from an earlier one in sizes or whole numbers only,
these vary in the new program, as far as the model lets them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten

from stagecut.backend.costs.balance import AtModules
from stagecut.backend.progress import doing
from stagecut.backend.serve.again import Again
from stagecut.backend.serve.away import Homes
from stagecut.backend.serve.faster import faster, is_static, recorded_step
from stagecut.backend.serve.line import Line, Seat
from stagecut.backend.serve.step import Call, LocalStep, RankStep, Step, lane_bytes
from stagecut.backend.stages.modules import Stage, find, put
from stagecut.check import compare, is_cheap
from stagecut.frontend.markers import SplitPoint
from stagecut.frontend.policy import Cuts, as_cuts, takes_graph
from stagecut.frontend.source import place_of
from stagecut.ir.check.validator import Trace, validate
from stagecut.ir.errors import InputError, SplitError, StagecutError
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.run.bindings import Bindings
from stagecut.ir.run.call import check_inputs
from stagecut.ir.run.given import Apart, Fixed, mapped, opened_arguments
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.runner import run_passes
from stagecut.pipe import Pipe, _split_points, lower

MOST_PROGRAMS = 24
"""Programs that are kept, those of the latest calls. A model that needs so many in so many calls is not
served: each call would be traced.
"""

ONE_MODE = "a model that generates stays in its mode"


@dataclass(frozen=True)
class Fit:
    """A program that fits a call, and the call as the program takes it."""

    pipe: Pipe
    call: Call
    flat: list[Any]
    sizes: dict[str, int]

    def run(self, kwargs: Mapping[str, Any]) -> Any:
        """The result of the call. The objects that it is given are left as forward leaves them."""
        spec = self.pipe._call_spec
        assert spec is not None
        outputs = self.call(self.flat)
        return spec.unflatten(outputs, (), kwargs)


@dataclass(frozen=True)
class _Example:
    """The structure, sizes and numbers of a call that was traced."""

    flat: list[Any]
    spec: Any

    @staticmethod
    def of(kwargs: Mapping[str, Any]) -> _Example:
        flat, spec = tree_flatten(opened_arguments(dict(kwargs)))
        return _Example([_kind(leaf) for leaf in flat], spec)

    def varying(self, other: _Example) -> dict[int, set[int | None]]:
        """Leaf -> the dims in which it differs from that of `other`, None for a number. Nothing where the
        calls differ in more.
        """
        varying: dict[int, set[int | None]] = {}
        if self.spec != other.spec:
            return varying
        for place, (one, another) in enumerate(
            zip(
                self.flat,
                other.flat,
                strict=True,
            )
        ):
            dims = _differing(one, another)
            if dims is None:
                return {}
            if dims:
                varying[place] = dims
        return varying


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, *leaf.shape)
    return leaf


def _differing(one: Any, other: Any) -> set[int | None] | None:
    """The dims in which two leaves differ; None where they differ in more than sizes. A size of 0 or 1 is no
    example of others.
    """
    if type(one) is int and type(other) is int:
        return {None} if one != other else set()
    if type(one) is not tuple or type(other) is not tuple:
        return set() if one == other else None
    if one[0] != other[0] or len(one) != len(other):
        return None
    dims: set[int | None] = set()
    for dim, (size, other_size) in enumerate(
        zip(
            one[1:],
            other[1:],
            strict=True,
        )
    ):
        if size == other_size:
            continue
        if min(size, other_size) < 2:
            return None
        dims.add(dim)
    return dims


@dataclass(frozen=True)
class Source:
    """Where the weights of a model on the meta device come from, as for `Pipe.materialize`."""

    checkpoint: str | Path | None = None
    init_fn: Callable[[nn.Module], Any] | None = None


class Programs:
    """The programs of `model` that calls have needed so far. `spec` and `policy` say where it is cut; a
    policy is asked once. With a `seat`, this process runs one stage; without one, all, on `device`. Programs
    whose sizes do not vary are `compiled`, and captured in CUDA `graphs`.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Mapping[str, SplitPoint] | None,
        policy: Any,
        seat: Seat | None = None,
        device: torch.device | None = None,
        source: Source | None = None,
        compiled: bool = False,
        graphs: bool = False,
    ) -> None:
        self._model = model
        own = next(model.parameters()).device
        self._device = own if device is None else device
        self._moves = self._device != own
        self._source = source or Source()
        self._compiled = compiled
        self._record = recorded_step if graphs else None
        self._spec = None if spec is None else dict(spec)
        self._policy = policy
        self._seat = seat
        self._line = None if seat is None else Line(seat)
        self._homes = Homes()
        self._cut: list[tuple[Pipe, Step]] = []
        self._examples: list[_Example] = []
        self._sizes: dict[Pipe, dict[str, int]] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._again: Again[Fit] = Again()
        self._cut_with: dict[str, torch.Tensor] = {}
        """The parameters of the model when it was first cut."""
        self._traced_in_a_row = 0

    @property
    def pipes(self) -> list[Pipe]:
        """The pipes, in the order in which calls needed them."""
        return [pipe for pipe, _ in self._cut]

    @property
    def spec(self) -> dict[str, SplitPoint] | None:
        """The places of the cuts; None before the first call where a policy chooses them."""
        return self._spec

    def fitting(self, kwargs: Mapping[str, Any]) -> Fit:
        """A program that fits a call by these keyword arguments, traced where there is none yet."""
        again = self._again.found(kwargs)
        if again is not None:
            fit, flat = again
            self._traced_in_a_row = 0
            return replace(fit, flat=flat)
        fit = self._searched(kwargs)
        if is_static(fit.pipe.program):
            # another cache has new tensors after each call: it never comes again, and to note it would keep
            # the tensors that it had before
            self._again.note(kwargs, fit.flat, fit)
        return fit

    def _searched(self, kwargs: Mapping[str, Any]) -> Fit:
        for place, (pipe, step) in enumerate(self._cut):
            fit = _fit(pipe, step, kwargs)
            if fit is not None:
                # steps come in rows of one kind
                self._cut.insert(0, self._cut.pop(place))
                self._traced_in_a_row = 0
                self._sizes[pipe] = fit.sizes
                return fit
        number = len(self._examples) + 1
        with doing(f"tracing {type(self._model).__name__}, program {number} for calls"):
            pipe = self._traced(kwargs)
        self._traced_in_a_row += 1
        self._cut.insert(0, (pipe, self._step(pipe)))
        for unused, _ in self._cut[MOST_PROGRAMS:]:
            self._sizes.pop(unused, None)
        del self._cut[MOST_PROGRAMS:]
        fit = _fit(*self._cut[0], kwargs)
        assert fit is not None
        self._sizes[pipe] = fit.sizes
        return fit

    def cache_bytes(self) -> dict[int, int]:
        """Stage -> the bytes of the cache of one request there, the largest of the last calls."""
        largest: dict[int, int] = {}
        for pipe, sizes in self._sizes.items():
            for stage, size in lane_bytes(pipe.program, sizes).items():
                largest[stage] = max(size, largest.get(stage, 0))
        return largest

    def refuse_replaced(self) -> None:
        """Returns when the model has the parameters with which it was cut; raises StagecutError when one was
        replaced since, added or taken away, or has other attributes than its code read.
        """
        for pipe in self.pipes:
            pipe.refuse_changed_model()
        if not self._cut_with:
            return
        now = _parameters(self._model)
        for name in {**self._cut_with, **now}:
            if now.get(name) is self._cut_with.get(name):
                continue
            raise StagecutError(
                f"parameter '{name}' of {type(self._model).__name__} is another one than when it was cut",
                where=place_of(type(self._model)),
                hint="change weights in place (copy_, load_state_dict), or make a new Generator",
            )

    def finish(self) -> None:
        """Nothing is on its way between the stages."""
        if self._line is not None:
            self._line.finish()

    def _step(self, pipe: Pipe) -> Step:
        seat = self._seat
        own = range(pipe.num_stages) if seat is None else [seat.rank]
        if self._moves:
            for index in own:
                self._settle(pipe, index)
        runs = [
            faster(
                pipe,
                index,
                self._compiled,
                self._record,
            )
            for index in own
        ]
        if seat is None or self._line is None:
            return LocalStep(pipe, self._device, runs)
        record = self._record if is_static(pipe.program) else None
        return RankStep(pipe, seat, self._line, self._homes, runs[0], record)

    @torch.inference_mode(False)  # tensors that are made in it cannot be traced
    def _traced(self, kwargs: Mapping[str, Any]) -> Pipe:
        if self._traced_in_a_row == MOST_PROGRAMS:
            raise StagecutError(
                f"each of {MOST_PROGRAMS} calls of {type(self._model).__name__} had to be traced, and this "
                "one fits no trace either",
                hint="its calls differ in more than sizes: give them equal structure, or a static cache",
            )
        self._cut_with = self._cut_with or _parameters(self._model)
        example = _Example.of(kwargs)
        varying: dict[int, set[int | None]] = {}
        for earlier in self._examples:
            for place, dims in example.varying(earlier).items():
                varying.setdefault(place, set()).update(dims)
        self._examples.append(example)
        device = next(self._model.parameters()).device
        call = mapped(
            lambda leaf: _example_on(device, leaf),
            dict(kwargs),
        )
        if not varying:
            return self._pipe(call, None)
        try:
            return self._pipe(
                call,
                _shapes(call, len(example.flat), varying),
            )
        except StagecutError:
            # the model fixes them: this call gets a program of its own
            return self._pipe(call, None)

    def _pipe(self, call: dict[str, Any], shapes: Any) -> Pipe:
        names = [*(self._spec or {})]
        program, bindings, exported = lower(
            self._model,
            (),
            call,
            shapes,
            (),
            names,
            ONE_MODE,
            batches=False,
            grad=False,  # as transformers generates
            # a policy that edits the traced GraphModule, and is still to be asked, is given all of it
            fold=self._spec is not None or not takes_graph(self._policy),
        )
        trace = Trace(program)
        at = _split_points(self._spec or {}, self._model)
        policy = None
        if self._spec is None:
            policy = self._choose(self._policy_for(exported, bindings), bindings)
        run_passes(
            program, default_pipeline(FindSplits(at, policy, {}, bindings.whole))
        )
        validate(trace, program)
        pipe = Pipe(program, bindings)
        pipe._model = weakref.ref(self._model)
        if self._seat is None and is_cheap(
            self._model,
            ((), call),
        ):
            report = compare(self._model, pipe, (), call, gradients=False)
            if not report.ok:
                raise StagecutError(
                    f"the stages do not compute what the model computes: {report.differences[0]}",
                    hint="pipeline(model, ...) on the same arguments says more",
                )
        return pipe

    def _policy_for(self, exported: Any, bindings: Bindings) -> Cuts:
        policy = self._policy
        if hasattr(policy, "plan"):
            return lambda program: list(policy.plan(program, {}, bindings).cuts)
        return as_cuts(policy, exported)

    def _choose(self, policy: Cuts, bindings: Bindings) -> Cuts:
        """A policy that cuts at the modules that begin nearest to the cuts of `policy`, and notes them."""

        def cuts(program: Program) -> list[int]:
            left = program.outputs[bindings.call.result_leaves :]
            kept = {value for value in left if isinstance(value, Value)}
            kept.update(lane.given for lane in program.lanes)
            paths = beginnings_near(program, policy(program), kept)
            self._spec = dict.fromkeys(paths, SplitPoint.BEGINNING)
            return AtModules(paths)(program)

        return cuts

    def _settle(self, pipe: Pipe, index: int) -> None:
        """A stage is on the device of this process, with the tensors that it has in the other programs."""
        stage = pipe.stages[index]
        held = pipe.program.stages[index].state.items()
        # constants belong to the program
        names = [*chain(*(names for entry, names in held if entry.kind != "const"))]
        known = [name for name in names if name in self._weights]
        for name in known:
            put(stage, name, self._weights[name])
        if next(self._model.parameters()).is_meta:
            whole = len(known) == len(names)
            source = self._source
            pipe.materialize(
                index,
                None if whole else source.checkpoint,
                device=self._device,
                init_fn=source.init_fn,
            )
        for name, tensor in zip(
            names,
            _tensors(stage, names),
            strict=True,
        ):
            if name not in self._weights:
                self._weights[name] = _on(self._device, tensor)
                put(stage, name, self._weights[name])
        stage.to(self._device)
        if self._device.type == "cuda":
            # requests in flight have streams of their own
            torch.cuda.synchronize(self._device)


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _tensors(stage: Stage, names: Sequence[str]) -> list[torch.Tensor]:
    tensors = [find(stage, name) for name in names]
    return [tensor for tensor in tensors if tensor is not None]


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a device: a tensor of its own, so that the model keeps its."""
    moved = tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, requires_grad=False)
    return moved


def _fit(pipe: Pipe, step: Step, kwargs: Mapping[str, Any]) -> Fit | None:
    spec = pipe._call_spec
    assert spec is not None
    try:
        flat = spec.flatten((), dict(kwargs))
        sizes = check_inputs(pipe.program.inputs, flat, spec.ranges)
    except InputError:
        return None
    return Fit(pipe, step.prepared(flat, sizes), flat, sizes)


def _example_on(device: torch.device, leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_meta:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
    return leaf.detach().to(device, copy=True)


def _shapes(
    call: Mapping[str, Any], leaves: int, varying: Mapping[int, set[int | None]]
) -> Any:
    """The dynamic shapes of a call, as torch.export takes them."""

    def shape(place: int) -> Any:
        dims = varying.get(place, ())
        if None in dims:
            return Dim.AUTO
        return dict.fromkeys(dims, Dim.AUTO) if dims else None

    return _like(
        opened_arguments(dict(call)),
        iter([shape(n) for n in range(leaves)]),
    )


def _like(node: Any, leaves: Iterator[Any]) -> Any:
    """A tree of builtin containers with these leaves, of the structure of `node`."""
    if isinstance(node, Apart):
        return [_like(part, leaves) for part in node.parts]
    if isinstance(node, Fixed):
        return []
    if type(node) is dict:
        return {key: _like(part, leaves) for key, part in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_like(part, leaves) for part in node)
    registered = SUPPORTED_NODES.get(type(node))
    if registered is None:
        return next(leaves)
    parts, _ = registered.flatten_fn(node)
    return [_like(part, leaves) for part in parts]


def _block_of(op: Op) -> str:
    """The outermost module of a list of modules that an op is in; '' for none."""
    path = ""
    for frame in op.scope:
        path = f"{path}.{frame.name}".removeprefix(".")
        if frame.name.rpartition(".")[2].isdigit():
            return path  # the modules inside are parts of a block
    return ""


def beginnings_near(
    program: Program, cuts: Sequence[int], kept: Set[Value] = frozenset()
) -> list[str]:
    """For each cut, the module of a list of modules that begins nearest to it, such as `layers.4`: the
    programs of one model have these in common, and not the positions of ops.

    `kept` are the values that a cache holds. The lists of modules that touch them are taken where there are
    any: a prefill runs others besides, such as those of a vision tower, that no decode step runs.
    """
    starts: dict[str, dict[str, int]] = {}
    keeping: set[str] = set()
    for position, op in enumerate(program.ops):
        path = _block_of(op)
        if not path:
            continue
        parent = path.rpartition(".")[0]
        starts.setdefault(parent, {}).setdefault(path, position)
        if not kept.isdisjoint([*op.reads, *op.definitions()]):
            keeping.add(parent)
    chosen: list[str] = []
    candidates: dict[str, int] = {}
    for parent, group in starts.items():
        if len(group) > 1 and (not keeping or parent in keeping):
            candidates |= group
    for cut in cuts:
        rest = [path for path in candidates if path not in chosen]
        if not rest:
            raise SplitError(
                f"there are not {len(cuts)} places between modules to cut {program.name} at",
                hint='name them: split_spec={"layers.4": SplitPoint.BEGINNING}',
            )
        chosen.append(
            min(
                rest,
                key=lambda path: abs(candidates[path] - cut),
            )
        )
    return sorted(chosen, key=candidates.__getitem__)
