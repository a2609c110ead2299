"""The one comparer of the tests: what a call of a model leaves behind, by name, and where two calls differ.

It shares no code with `stagecut.check`, which the tests hold to account too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from stagecut import Pipe
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.backend.stages.crossing import refuse_shared, written_arguments
from stagecut.frontend.capture.capture import distinct_tensors
from stagecut.ir.run.objects import opened

Call = tuple[tuple[Any, ...], dict[str, Any]]
Seen = dict[str, Any]
"""What a call leaves behind: `output[0]`, `gradient of lin.weight`, `aliases` and so on."""


class Posted:
    """The stages as separate processes would run them: they get copies, and share no tensor."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._box = self._mailbox(pipe)
        self._given: list[Any] = []

    def _mailbox(self, pipe: Pipe) -> Mailbox:
        return Mailbox(pipe.program, pipe.stages)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._given = self._pipe.flatten(args, kwargs)
        refuse_shared(self._pipe.program, written_arguments(self._pipe.program), self._given)
        outputs = self._box.forward(self._pipe.flatten(*distinct_tensors((args, kwargs))))
        spec = self._pipe._call_spec
        return spec.unflatten(outputs, args, kwargs) if spec is not None else outputs

    def train(self, mode: bool) -> None:
        """Its stages switch, those of the pipe do not."""
        for stage in self._box._stages:
            stage.train(mode)

    def backward(self) -> None:
        """Sends the gradients of the outputs back."""
        self._box.backward()

    def state(self, kind: str) -> dict[str, torch.Tensor]:
        """Parameters or buffers by name."""
        trained = self._box.gradients()
        return {name: tensor for name, tensor in self._box.state().items() if (name in trained) == (kind == "parameter")}

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Those of the parameters by name."""
        return self._box.gradients()

    def input_gradient(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The sum over all inputs as which the tensor was given."""
        pairs = zip(self._given, self._box.input_gradients(), strict=True)
        parts = [grad for given, grad in pairs if given is tensor and grad is not None]
        return torch.stack(parts).sum(0) if parts else None


class InOne:
    """A module, or a pipe as one, seen as `Posted` is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self) -> None:
        """Nothing is left to do."""

    def state(self, kind: str) -> dict[str, torch.Tensor]:
        """Parameters or buffers by name."""
        return dict(getattr(self._module, f"named_{kind}s")(remove_duplicate=False))

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Those of the parameters by name."""
        return {name: parameter.grad for name, parameter in self.state("parameter").items()}

    def input_gradient(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """That of a leaf."""
        return tensor.grad if tensor.is_leaf else None


# --- what a call does -----------------------------------------------------------------------------------


def weighted(output: Any) -> torch.Tensor | None:
    """A loss that tells all elements of all outputs apart; None where nothing carries gradient."""
    losses = [_weighted(leaf) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return torch.stack(losses).sum() if losses else None


def _weighted(leaf: torch.Tensor) -> torch.Tensor:
    real = (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).double()
    return (real * torch.arange(1, real.numel() + 1).view(real.shape)).sum()


def observe(run: Any, call: Call, seed: int = 5, loss: Callable[[Any], torch.Tensor | None] = weighted) -> Seen:
    """What a call of a module, a pipe's module or of posted stages does, forward and backward."""
    runner = run if isinstance(run, Posted) else InOne(run)
    torch.default_generator.manual_seed(seed)  # without the stack that torch.manual_seed keeps for GPUs
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    given = {f"input {i}": tensor for i, tensor in enumerate(_tensors_in(call).values())}
    output = runner(*call[0], **call[1])
    seen: Seen = {"random state": torch.get_rng_state()}
    leaves, seen["structure"] = tree_flatten_with_path(opened(output))
    outputs = {f"output{keystr(path)}": leaf for path, leaf in leaves}
    left = {f"left in {path}": x for path, x in _tensors_in(call).items() if all(x is not other for other in given.values())}
    state = {f"{kind} {name}": tensor for kind in ("parameter", "buffer") for name, tensor in runner.state(kind).items()}
    seen |= _copied(outputs)
    seen["aliases"] = _aliases(outputs, given)
    seen["aliases of state"] = _aliases(outputs, state)
    total = loss([output, *left.values()] if left else output)
    if total is not None:
        total.backward()
        runner.backward()
    seen |= _copied(given) | _copied(left) | _copied(state)
    seen |= _copied({f"gradient of {name}": runner.input_gradient(tensor) for name, tensor in given.items()})
    return seen | _copied({f"gradient of {name}": grad for name, grad in runner.gradients().items()})


def _tensors_in(call: Call) -> dict[str, torch.Tensor]:
    """The tensors in the arguments, by their places."""
    leaves = tree_flatten_with_path(opened(call, every=True))[0]
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _copied(named: dict[str, Any]) -> Seen:
    return {name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for name, x in named.items()}


def _aliases(outputs: dict[str, Any], others: dict[str, Any]) -> list[list[str]]:
    """For each output, the names of what it is or shares storage with, among `others` and the outputs before it."""
    known: dict[str, torch.Tensor] = dict(others)
    found = []
    for name, output in outputs.items():
        if isinstance(output, torch.Tensor):
            place = output.untyped_storage()._cdata
            found.append([f"{'is' if x is output else 'shares'} {n}" for n, x in known.items() if x.untyped_storage()._cdata == place])
            known[name] = output
    return found


def observe_all(run: Any, calls: Iterable[Call]) -> Seen:
    """What several calls do, one after the other."""
    return {f"{name} in call {i}": item for i, call in enumerate(calls) for name, item in observe(run, call).items()}


def snapshot(model: nn.Module) -> Seen:
    """State by name, copied."""
    return _copied(dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]))


# --- where two calls differ -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """How far numbers may be apart, relative to the largest of their tensor, or to `least` where that is more.

    gradients: of gradients, whose parts are summed in another order; None goes by their dtype. others: of all else.
    The rest says what is compared besides. Without `gaps`, strides are only held to the order in which elements lie.
    """

    gradients: float | None = None
    others: float = 0.0
    least: float = 1.0
    strides: bool = True
    gaps: bool = True
    gradient_strides: bool = True
    requires_grad: bool = True


EXACT = Near()
APART = ("aliases", "input")
"""What is another matter for stages that share nothing with what they are given."""
_ROUNDING = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-5, torch.complex64: 1e-5}


def differences(expected: Seen, found: Seen, near: Near = EXACT, without: tuple[str, ...] = ()) -> list[str]:
    """Where two calls differ, in all but what begins with one of `without`. Only gradients and what `near` allows may be inexact."""
    compared = [name for name in (*expected, *(found.keys() - expected.keys())) if not name.startswith(without)]
    wrong = [(name, _difference(name, expected, found, near)) for name in compared]
    return [f"{name} {what}" for name, what in wrong if what]


def _difference(name: str, expected: Seen, found: Seen, near: Near) -> str | None:
    if name not in found or name not in expected:
        return "is missing" if name in expected else "is new"
    one, other = expected[name], found[name]
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return None if type(one) is type(other) and one == other else f"differs: {other!r} instead of {one!r}"
    allowed, strides = near.others, near.strides
    if name.startswith("gradient"):
        allowed = _ROUNDING.get(one.dtype, 0.02) if near.gradients is None else near.gradients
        strides = near.gradient_strides
    ours, theirs = (_form(tensor, strides, near) for tensor in (other, one))
    if ours != theirs:
        return f"differs: {ours} instead of {theirs}"
    return None if _close(one.detach(), other.detach(), allowed, near.least) else f"differs: {other} instead of {one}"


def _form(tensor: torch.Tensor, strides: bool, near: Near) -> str:
    layout = f" strides {list(tensor.stride() if near.gaps else _closed(tensor))}" if strides else ""
    gradient = f" requires_grad {tensor.requires_grad}" if near.requires_grad else ""
    return f"{tensor.dtype}{list(tensor.shape)}{layout}{gradient}"


def _closed(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie in the same order without gaps; dims of one element say nothing."""
    return torch.empty_like(tensor.squeeze()).stride()


def _close(one: torch.Tensor, other: torch.Tensor, allowed: float, least: float) -> bool:
    if one.is_floating_point() and one.element_size() == 1:
        one, other = one.float(), other.float()
    if torch.equal(one, other):
        return True
    if not one.is_floating_point() and not one.is_complex():
        return False
    finite = one[one.isfinite()].abs()
    scale = max(least, finite.max().item() if finite.numel() else 0.0)
    return torch.allclose(other, one, rtol=allowed, atol=allowed * scale, equal_nan=True)


def assert_same(found: Any, expected: Any, what: str, near: Near = EXACT) -> None:
    """Two trees are equal, gradients (`what` begins so) up to rounding."""
    trees = [{f"{what}{keystr(path)}": x for path, x in tree_flatten_with_path(tree)[0]} for tree in (expected, found)]
    wrong = differences(*trees, near)
    assert not wrong, "\n".join(wrong)


# --- names ----------------------------------------------------------------------------------------------


def names(model: nn.Module, pipe: Pipe) -> list[str]:
    """Where names differ: those of each stage are the model's, all together they are all of the model's, and tensors are its own."""
    own = model.state_dict(keep_vars=True)
    held = [stage.state_dict(keep_vars=True) for stage in pipe.stages]
    wrong = [f"stage {i} holds another '{n}'" for i, state in enumerate(held) for n, tensor in state.items() if tensor is not own.get(n)]
    wrong += [f"no stage holds '{n}'" for n in own if not any(n in state for state in held)]
    if list(pipe.state_dict()) != list(own):
        wrong.append("state_dict has another order")
    modules = _listed(model, "modules")
    if not isinstance(model, fx.GraphModule):  # which has no modules but those that it calls
        wrong += [f"stage {i} has a module '{n}'" for i, stage in enumerate(pipe.stages) for n in _listed(stage, "modules") - modules]
    for kind in ("parameters", "buffers"):
        odd = _listed(model, kind) ^ _listed(pipe, kind)
        wrong += [f"named_{kind} differ in '{n}'" for n in sorted(odd)]
    return wrong


def _listed(module: nn.Module, kind: str) -> set[str]:
    listing: Iterator[tuple[str, Any]] = getattr(module, f"named_{kind}")(remove_duplicate=False)
    return {name for name, _ in listing}
