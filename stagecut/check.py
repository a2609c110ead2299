"""Does the pipe compute what the model computes? Runs both on the same arguments and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten

from stagecut.backend.stages.modules import Stage, StageModule, copied
from stagecut.backend.stages.run import run_stages
from stagecut.backend.stages.staged import Staged
from stagecut.frontend.source import (
    failing_line,
    first_line,
    gpus,
    is_raised_by_user,
)
from stagecut.frontend.watch.globals import random_state
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import BY_MODE, Mode, Op, Program, Value, literals
from stagecut.ir.run.given import GivenObjects, mapped, opened_arguments
from stagecut.ir.types import TensorType

CHECK_BYTES = 2**28
"""The largest state, in bytes, that is compared by default."""

MOST_SHOWN = 20
"""So many differences are printed."""


def is_real(model: nn.Module, inputs: Any) -> bool:
    """True when all tensors of `model` and `inputs` have values."""
    return all(
        t.device.type != "meta" and not isinstance(t, torch._subclasses.FakeTensor)
        for t in _tensors(model, inputs)
    )


def as_written(model: Any) -> AbstractContextManager[Any]:
    """While open, what torch.compile made of parts of the model runs as it was written: compiled, it rounds
    otherwise. Without such parts nothing changes, since branches (`torch.cond`) need the compiler.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if any(_is_compiled(part) for part in parts):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def _is_compiled(part: nn.Module) -> bool:
    return isinstance(part, OptimizedModule) or part._compiled_call_impl is not None


def is_cheap(model: nn.Module, inputs: Any) -> bool:
    """True when running a copy of `model` on a copy of `inputs` is possible and costs little."""
    return (
        is_real(model, inputs)
        and sum(t.numel() * t.element_size() for t in _tensors(model, inputs))
        <= CHECK_BYTES
    )


def _tensors(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    return [
        *model.parameters(),
        *model.buffers(),
        *_tensor_leaves(inputs),
    ]


def _tensor_leaves(tree: Any) -> list[torch.Tensor]:
    leaves, _ = tree_flatten(opened_arguments(tree))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class CheckError(StagecutError):
    """The pipe does not compute what the model computes."""

    __module__ = "stagecut"


class CannotCompare(StagecutError):
    """The original model cannot be run beside the pipe. `cause` is its own exception, where it has one."""

    __module__ = "stagecut"


@dataclass(repr=False)
class Report:
    """The result of `Pipe.verify`. `ok` is the verdict, `print` shows what was compared and what differs.

    compared: kind of comparison -> how many were made. differences: a line for each thing that differs.
    """

    compared: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when nothing differs."""
        return not self.differences

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        counts = [f"{count} {kind}" for kind, count in self.compared.items()]
        verdict = "equal" if self.ok else "DIFFERENT"
        head = f"{verdict}: compared {', '.join(counts)}"
        shown = self.differences[:MOST_SHOWN]
        lines = [head, *shown]
        left = len(self.differences) - len(shown)
        if left:
            rest = f"{left} more in report.differences"
            lines.append(rest)
        return "\n".join(lines)

    def note(self, kind: str, found: str | None) -> None:
        """Counts one comparison of a `kind`; `found` says what differs, None for equal."""
        self.compared[kind] = self.compared.get(kind, 0) + 1
        if found:
            self.differences.append(found)


@dataclass
class _Run:
    outputs: list[Any]
    gradients: dict[str, torch.Tensor | None]
    input_gradients: dict[int, torch.Tensor | None]
    """Of the tensors that are to have one, by their number among the tensors of the inputs."""
    state: dict[str, torch.Tensor]
    written: dict[int, torch.Tensor]


def holds_both_modes(program: Program) -> bool:
    """True when train and eval mode were traced, because Python chose by the mode. A run in one mode shows
    nothing about the other.
    """
    return any(
        op.target == BY_MODE or any(map(_is_choice, literals((op.args, op.kwargs))))
        for op in program.all_ops()
    )


def _is_choice(literal: Any) -> bool:
    return isinstance(literal, Mode) and not literal.is_flag


def compare(
    model: nn.Module,
    pipe: Staged,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    gradients: bool = True,
    switched: bool = False,
) -> Report:
    """A report on `pipe` against `model` on one call, in the mode of the pipe, or with `switched` in the
    other one.

    Works on copies; the random state is restored afterwards.
    """
    reference, stages = _copies(model, pipe)
    _into_mode(reference, stages, pipe.training, switched)
    program = pipe.program
    devices = gpus(model, args, kwargs)
    with (
        as_written(model),
        torch.random.fork_rng(devices),
        torch.set_grad_enabled(gradients),
        ExitStack() as stack,
    ):
        seed_again = random_state(model, devices)
        stack.callback(seed_again)
        # each run begins from a state that was set: cuDNN draws anew for an RNN only where one was
        seed_again()
        inputs = fresh((tuple(args), dict(kwargs)))
        try:
            with _gradients_apart(model):
                expected = _observe(
                    lambda: outcome_of(reference, inputs),
                    reference,
                    inputs,
                    gradients,
                )
        except CannotCompare:
            raise
        except Exception as error:
            raise_ours(error)
            refusal = CannotCompare(
                f"{type(model).__name__} itself fails on these inputs: {first_line(error)}",
                where=failing_line(error, type(model)),
            )
            refusal.cause = error
            raise refusal from error
        seed_again()
        inputs = fresh((tuple(args), dict(kwargs)))
        flat = pipe.flatten(*inputs)
        actual = _observe(
            lambda: run_stages(program, stages, pipe._plan, flat),
            _Holder(program, stages),
            inputs,
            gradients,
        )
        report = Report()
        # before the second call: it may write what the first one returned
        _compare_outputs(report, program, expected.outputs, actual.outputs)
        second_outputs = _second_call(
            reference, (tuple(args), dict(kwargs)), pipe, stages
        )
    tolerance = _program_tolerance(program)
    for in_model, in_pipe in second_outputs:
        report.note(
            "outputs of a second call",
            difference("an output of a second call", in_model, in_pipe),
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = parameters | dict(model.named_buffers(remove_duplicate=False))
    for name, in_model in expected.state.items():
        if name not in named:
            continue  # copying a GraphModule makes buffers of its constants
        what = f"state '{name}' afterwards"
        in_pipe = actual.state.get(name)
        report.note("state", difference(what, in_model, in_pipe))
    for index in sorted(expected.written.keys() | actual.written.keys()):
        pair = expected.written.get(index), actual.written.get(index)
        report.note(
            "inputs", difference(f"tensor {index} of the inputs afterwards", *pair)
        )
    _compare_gradients(report, expected, actual, tolerance)
    _compare_names(report, model, stages)
    return report


def failure_on(
    model: nn.Module, pipe: Staged, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Exception | None:
    """The exception with which `model` fails on these inputs, without gradients, where that is because of the
    inputs; else None.

    Either the model's own code refuses them, or the stages fail on them too, and it is not the machine that
    lacks something. That the stages fail as well shows that it was not the copying of the model.
    """
    inputs = (tuple(args), dict(kwargs))
    reference, stages = _copies(model, pipe)
    _into_mode(reference, stages, pipe.training, switched=False)
    devices = gpus(model, args, kwargs)
    with (
        as_written(model),
        torch.random.fork_rng(devices),
        torch.no_grad(),
        ExitStack() as stack,
    ):
        seed_again = random_state(model, devices)
        stack.callback(seed_again)
        seed_again()
        in_model = _failure(lambda: outcome_of(reference, fresh(inputs)))
        seed_again()
        flat = pipe.flatten(*fresh(inputs))
        in_pipe = _failure(
            lambda: run_stages(pipe.program, stages, pipe._plan, flat),
        )
    if in_model is None or not _is_about_inputs(in_model):
        return None
    if is_raised_by_user(in_model) or _is_about_inputs(in_pipe):
        return in_model
    return None


def _failure(run: Callable[[], Any]) -> Exception | None:
    """The exception that a run of the model's code raises, None where it works."""
    try:
        run()
    except Exception as error:
        raise_ours(error)
        return error
    return None


_OF_THE_MACHINE = (
    StagecutError,
    ImportError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
)
_WORDS_OF_THE_MACHINE = (
    "backend",
    "cuda",
    "cudnn",
    "driver",
    "gpu",
    "memory",
    "not implemented",
    "not supported",
    "unsupported",
)
_ABOUT_INPUTS = (
    AssertionError,
    ArithmeticError,
    LookupError,
    ValueError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
)


def _is_about_inputs(error: Exception | None) -> bool:
    """True for an exception that other inputs could prevent. False where the machine may lack the memory, the
    kernel, the library or the device for an op: such errors have classes or words of their own.
    """
    if error is None or isinstance(error, _OF_THE_MACHINE):
        return False
    text = str(error).lower()
    if any(word in text for word in _WORDS_OF_THE_MACHINE):
        return False
    is_plain = isinstance(error, _ABOUT_INPUTS) or type(error) is RuntimeError
    return is_plain or is_raised_by_user(error)


def _second_call(
    reference: nn.Module, inputs: Any, pipe: Staged, stages: list[Any]
) -> list[tuple[Any, Any]]:
    """Outputs of the model and of the stages in a second call with other values. It shows facts of the first
    call that became fixed.
    """
    seed_again = random_state(reference, gpus(reference, inputs))
    inputs = mapped(
        lambda leaf: (
            leaf * 0.9 if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf
        ),
        inputs,
    )
    # in the grad mode of the first call: some of torch's own modules compute otherwise without gradients
    call = fresh(inputs)
    seed_again()
    try:
        expected = tree_flatten(outcome_of(reference, call))[0]
    except Exception as error:  # it refuses these values
        raise_ours(error)
        return []
    seed_again()
    flat = pipe.flatten(*fresh(inputs))
    actual = run_stages(pipe.program, stages, pipe._plan, flat)
    # if they differ in number, the first call has shown it
    return list(zip(expected, actual, strict=False))


def _copies(model: nn.Module, pipe: Staged) -> tuple[nn.Module, list[Stage]]:
    try:
        return copied(model)[0], copied(*pipe.stages)
    except Exception as error:
        raise_ours(error)
        raise CannotCompare(
            f"{type(model).__name__} cannot be copied, so it cannot be compared: {error}"
        ) from error


def _into_mode(
    reference: nn.Module, stages: Sequence[Stage], training: bool, switched: bool
) -> None:
    """The copy of the model is in the mode of the pipe, module by module. With `switched`, both are in the
    other mode.
    """
    if switched:
        for module in (reference, *stages):
            module.train(not training)
        return
    if reference.training != training:
        reference.train(training)
    own = dict(reference.named_modules(remove_duplicate=False))
    for stage in stages:
        for part in stage.modules():
            if isinstance(part, StageModule) and part._path in own:
                own[part._path].training = part.training


@contextmanager
def _gradients_apart(model: nn.Module) -> Iterator[None]:
    """Gradients of `model` are the same afterwards as before. Raises CannotCompare when the copy that ran
    computed with parameters of `model`.
    """
    parameters = dict(model.named_parameters())
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
        shared = [
            name for name, parameter in parameters.items() if parameter.grad is not None
        ]
    finally:
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
    if shared:
        raise CannotCompare(
            f"a copy of {type(model).__name__} still computes with the parameter '{shared[0]}' of the "
            "original"
        )


class _Holder:
    """The stages' parameters and buffers under the model's names."""

    def __init__(self, program: Program, stages: Sequence[nn.Module]) -> None:
        self._stages = stages

    def named_parameters(
        self, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them, tied ones under every name."""
        for stage in self._stages:
            yield from stage.named_parameters(remove_duplicate=remove_duplicate)

    def named_buffers(
        self, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, aliased ones under every name."""
        for stage in self._stages:
            yield from stage.named_buffers(remove_duplicate=remove_duplicate)


def outcome_of(module: nn.Module, inputs: Any) -> Any:
    """What a call of `module` returns, opened, with the changes that it makes to what it is given."""
    args, kwargs = inputs
    given = GivenObjects(args, kwargs)
    return given.outcome(module(*args, **kwargs))


def _observe(run: Any, holder: Any, inputs: Any, gradients: bool) -> _Run:
    # before the run, which may put other tensors into what it is given
    leaves = _tensor_leaves(inputs)
    asked = {index: leaf for index, leaf in enumerate(leaves) if leaf.requires_grad}
    versions = [leaf._version for leaf in leaves]
    outputs = tree_flatten(run())[0]
    parameters = dict(holder.named_parameters(remove_duplicate=False))
    if gradients:
        for parameter in parameters.values():
            parameter.grad = None
        losses = [
            _loss(o) for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad
        ]
        if losses:
            torch.stack(losses).sum().backward()
    named = parameters | dict(holder.named_buffers(remove_duplicate=False))
    state = {name: tensor.detach().clone() for name, tensor in named.items()}
    written = {
        index: leaf.detach().clone()
        for index, (leaf, version) in enumerate(zip(leaves, versions, strict=True))
        if leaf._version != version
    }
    if not gradients:
        return _Run(outputs, {}, {}, state, written)
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    input_grads = {
        index: leaf.grad if leaf.is_leaf else None for index, leaf in asked.items()
    }
    return _Run(outputs, grads, input_grads, state, written)


def _loss(output: torch.Tensor) -> torch.Tensor:
    """A scalar that depends on every element differently, so that gradients tell elements apart."""
    if output.layout is not torch.strided:
        output = output.to_dense()
    if output.is_complex():
        output = torch.view_as_real(output)
    flat = output.flatten()
    weights = torch.linspace(
        0.5, 1.5, flat.numel(), dtype=torch.float64, device=flat.device
    )
    return (flat.double() * weights).sum()  # nobody multiplies in float8


def fresh(tree: Any) -> Any:
    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return mapped(clone, tree)


def _compare_outputs(
    report: Report, program: Program, expected: list[Any], actual: list[Any]
) -> None:
    if len(expected) != len(actual):
        report.note(
            "outputs",
            f"the model returns {len(expected)} leaves, the pipe {len(actual)}",
        )
        return
    for index, (in_model, in_pipe) in enumerate(zip(expected, actual, strict=True)):
        what = f"output {index}{_where(program, index)}"
        report.note("outputs", difference(what, in_model, in_pipe))


def _compare_gradients(
    report: Report, expected: _Run, actual: _Run, tolerance: float
) -> None:
    sizes: list[float] = []
    for grad in expected.gradients.values():
        if grad is not None and grad.numel():
            sizes.append(_plain(grad).abs().max().item())
    largest = max(sizes, default=0.0)
    for name, in_model in expected.gradients.items():
        what = f"gradient of '{name}'"
        in_pipe = actual.gradients.get(name)
        allowed = max(tolerance, _summed(in_model))
        message = difference(what, in_model, in_pipe, allowed, largest)
        report.note("gradients", message)
    for index, in_model in expected.input_gradients.items():
        in_pipe = actual.input_gradients[index]
        what = f"gradient of input {index}"
        allowed = max(tolerance, _summed(in_model))
        report.note("input gradients", difference(what, in_model, in_pipe, allowed))


def _where(program: Program, index: int) -> str:
    leaf = program.outputs[index]
    if not isinstance(leaf, Value) or not isinstance(leaf.owner, Op):
        return ""
    stage = next((s.index for s in program.stages if leaf in s.outputs), None)
    return f" (stage {stage}, {leaf.owner.where()})"


def _compare_names(
    report: Report, model: nn.Module, stages: Sequence[nn.Module]
) -> None:
    names = {name for stage in stages for name in stage.state_dict()}
    own = set(model.state_dict())
    odd = sorted(names ^ own)
    report.note("names", f"state names differ: {odd[:5]}" if odd else None)
    report.compared["names"] = len(names | own)


_ROUNDING = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
}
"""Dtype -> how much a sum in another order may differ, relative to the largest element. For all other dtypes
2e-2.
"""


def _summed(gradient: torch.Tensor | None) -> float:
    """The difference allowed to a gradient, relative to its largest element: it is a sum of sums, which are
    often large and cancel out.
    """
    if gradient is None:
        return 0.0
    return 10 * _ROUNDING.get(gradient.dtype, 0.0)


def _program_tolerance(program: Program) -> float:
    """The difference allowed to gradients: their sums pass through the least precise dtype of the program."""
    dtypes = {
        v.type.dtype
        for op in program.all_ops()
        for v in op.results
        if isinstance(v.type, TensorType)
    }
    if dtypes & {"bf16", "f16"} or any(d.startswith("f8") for d in dtypes):
        return 2e-2
    return 0.0


def difference(
    what: str, in_model: Any, in_pipe: Any, tolerance: float = 0.0, among: float = 0.0
) -> str | None:
    """A message when the two differ by more than rounding. Rounding is relative to the tensor's largest
    element, or to a hundredth of `among` (the largest of all numbers of this kind) where that is more.
    """
    if not isinstance(in_model, torch.Tensor) or not isinstance(in_pipe, torch.Tensor):
        same_type = type(in_model) is type(in_pipe)
        if in_model is in_pipe or (same_type and in_model == in_pipe):
            return None
        return f"{what}: {_brief(in_model)} in the model, {_brief(in_pipe)} in the pipe"
    if in_model.requires_grad != in_pipe.requires_grad:
        return (
            f"{what}: requires_grad is {in_model.requires_grad} in the model, {in_pipe.requires_grad} "
            "in the pipe"
        )
    if in_model.layout != in_pipe.layout:
        return f"{what}: {in_model.layout} in the model, {in_pipe.layout} in the pipe"
    if in_model.dtype != in_pipe.dtype or in_model.shape != in_pipe.shape:
        return f"{what}: {_brief(in_model)} in the model, {_brief(in_pipe)} in the pipe"
    if is_traceable_wrapper_subclass(in_model):
        return _difference_inside(what, in_model, in_pipe, tolerance, among)
    dtype = in_model.dtype
    in_model = _plain(in_model)
    in_pipe = _plain(in_pipe)
    if torch.equal(in_model, in_pipe):
        return None
    finite = in_model[in_model.isfinite()]
    scale = 0.0
    if finite.numel():
        scale = finite.abs().max().item()
    if dtype.is_floating_point or dtype.is_complex:
        allowed = max(tolerance, _ROUNDING.get(dtype, 2e-2))
        if torch.allclose(
            in_model,
            in_pipe,
            rtol=allowed,
            atol=max(allowed * scale, 1e-2 * allowed * among),
            equal_nan=True,
        ):
            return None
    largest = (in_model - in_pipe).abs().max().item()
    return f"{what}: differs by up to {largest:.3g}, where the largest element is {scale:.3g}"


def _difference_inside(
    what: str, in_model: Any, in_pipe: Any, tolerance: float, among: float
) -> str | None:
    """As `difference`, for two tensors that are made of others, such as quantised weights."""
    if type(in_model) is not type(in_pipe):
        classes = type(in_model).__name__, type(in_pipe).__name__
        return f"{what}: a {classes[0]} in the model, a {classes[1]} in the pipe"
    for name in in_model.__tensor_flatten__()[0]:
        inside = getattr(in_model, name), getattr(in_pipe, name)
        message = difference(f"{what}, '{name}' of it", *inside, tolerance, among)
        if message is not None:
            return message
    return None


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a type that can be compared: dense, of the widest dtype. Tensors of int64 stay
    integers.
    """
    dense = (
        tensor.detach()
        if tensor.layout is torch.strided
        else tensor.detach().to_dense()
    )
    if dense.dtype is torch.int64:
        return dense
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _brief(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"{leaf!r:.60}"
