"""One run of a graph on fake tensors, node by node, which shows what fx does not record.

It shows the types of values, the tensors that a node writes, and whether the node draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from stagecut.frontend.capture.quiet import quiet_torch
from stagecut.frontend.capture.whole import (
    EffectObserver,
    behaviour_in_other_mode,
    home_of,
    tensors_in,
)
from stagecut.frontend.markers import is_marker
from stagecut.frontend.source import first_line, user_loc
from stagecut.frontend.watch.attributes import RETURN_IT, Containers
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError, SplitError
from stagecut.ir.run.storage import written_tensors


@dataclass(frozen=True)
class Ran:
    """The findings from running a node: its value, the memory that it writes, whether it draws random
    numbers.

    named: the tensors that it writes, by id, as far as they are seen. views: for each tensor that it returns
    with its training flags the other way round, the given memory in which the tensor lies; nothing where it
    has no flags. reshaped: the given tensors that have another shape now. flagged: the given tensors whose
    requires_grad has changed, though nothing was written. The last two were changed as objects, and not only
    in their elements.
    """

    value: Any
    wrote: frozenset[int]
    named: frozenset[int]
    random: bool
    views: tuple[int | None, ...] = ()
    reshaped: tuple[torch.Tensor, ...] = ()
    flagged: tuple[torch.Tensor, ...] = ()


Visit = Callable[[fx.Node, Ran], None]
"""A function that is called with each node after it has run."""


class _WriteObserver(EffectObserver):
    """Notices also which tensors ops write, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.named: set[int] = set()

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """The writes and draws of the op are noted."""
        for tensor in written_tensors(func, args, kwargs):
            # `x[0] = y` writes into a view that only the op has
            self.named.update(map(id, (tensor, tensor._base)))
        super().see(func, args, kwargs)


class FakeRun(fx.Interpreter):
    """Runs a graph on fake tensors. `state` are those that stand for parameters and buffers, by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.extra_traceback = False  # an error of ours says where it is
        self._visit: Visit = lambda node, ran: None
        self.state: dict[str, torch.Tensor] = {}
        twins: dict[int, torch.Tensor] = {}
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            self.state[name] = twins.setdefault(
                id(tensor), self._mode.from_tensor(tensor)
            )

    def visit(self, inputs: list[Any], visit: Visit) -> None:
        """Every node has run once on fakes of `inputs`, and was visited."""
        self._visit = visit
        fakes = [tree_map(self._fake, tree) for tree in inputs]
        # stacked: put back in reverse order, else a module of two names keeps a fake
        stand_ins = torch.nn.utils.stateless._reparametrize_module(
            self.module, self.state, tie_weights=False, stack_weights=True
        )
        # the graph may switch the grad mode and leave it so
        with (
            quiet_torch(),
            self._mode,
            stand_ins,
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            self.run(*fakes, enable_io_processing=False)

    def _fake(self, leaf: Any) -> Any:
        return self._mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant, as a fake too, so that its views are seen to be views."""
        constant = super().get_attr(target, args, kwargs)
        return constant if isinstance(constant, FakeTensor) else self._fake(constant)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; the node has been visited."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        looks = [_Look(tensor) for tensor in tensors_in((args, kwargs))]
        leaf = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        state = (*leaf.parameters(), *leaf.buffers()) if leaf is not None else ()
        state_looks = [_Look(tensor) for tensor in state]
        containers = Containers([args, kwargs], objects=False)
        with _named(n), _WriteObserver() as effects:
            result = super().run_node(n)
        _refuse_unseen(n, containers, effects)
        wrote = {look.home for look in (*looks, *state_looks) if look.is_written}
        wrote |= {home for home in effects.wrote if home is not None}
        random, views = effects.drew, tuple[int | None, ...]()
        if leaf is not None:
            other = behaviour_in_other_mode(leaf, leaf, args, kwargs)
            wrote |= other.wrote
            random = random or other.drew
            views = other.homes
        reshaped = tuple(look.tensor for look in looks if look.is_reshaped)
        flagged = tuple(look.tensor for look in looks if look.is_flagged)
        named = frozenset(effects.named)
        ran = Ran(result, frozenset(wrote), named, random, views, reshaped, flagged)
        self._visit(n, ran)
        return result


class _Look:
    """A tensor, and what it was when it was looked at."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.home = home_of(tensor)
        self._version = tensor._version
        self._shape = _shape_of(tensor)
        self._grad = tensor.requires_grad

    @property
    def is_written(self) -> bool:
        return self.tensor._version != self._version

    @property
    def is_reshaped(self) -> bool:
        return _shape_of(self.tensor) != self._shape

    @property
    def is_flagged(self) -> bool:
        return self.tensor.requires_grad != self._grad and not self.is_written


def _shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
    return tuple(tensor.shape), strides, home_of(tensor)


@contextmanager
def _named(node: fx.Node) -> Iterator[None]:
    """An exception inside becomes a CaptureError that names the node."""
    try:
        yield
    except Exception as error:
        raise_ours(error)
        raise CaptureError(
            f"node '{node.name}' ({node.op} {node.target}) fails on the example inputs: "
            f"{first_line(error)}",
            where=place_of_node(node),
            hint="the graph must run as it is on mb_args / mb_kwargs",
        ) from error


def _refuse_unseen(
    node: fx.Node, containers: Containers, effects: EffectObserver
) -> None:
    """Raises where a node changes a list or dict that it is given, or has a split point inside: its op would
    do neither.
    """
    if containers.changed():
        raise CaptureError(
            f"node '{node.name}' ({node.op} {node.target}) changes a container it is given, which no stage "
            "would",
            where=place_of_node(node),
            hint=RETURN_IT,
        )
    if effects.split and not is_marker(node.target):
        raise SplitError(
            f"a split point lies inside node '{node.name}' ({node.op} {node.target}), which is kept whole",
            where=effects.split,
            hint="put it into the graph: graph.call_function(pipe_split)",
        )


def place_of_node(node: fx.Node) -> str:
    """The user's line of a node, as far as the graph knows it."""
    return str(user_loc(node.meta.get("stack_trace") or "") or "the graph")
