"""Runs of a model on more samples than its example has.

A model that is cheap to run is run for real. Another one is run on fake tensors, which have sizes and no
values. The model is not changed, and neither is what it draws from or refers to.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stagecut.frontend.capture.example import giving_sizes
from stagecut.frontend.capture.quiet import quiet_torch
from stagecut.frontend.source import gpus
from stagecut.frontend.watch.attributes import ModelContainers
from stagecut.frontend.watch.generators import Generators
from stagecut.frontend.watch.globals import Surroundings
from stagecut.ir.blame import raise_ours
from stagecut.ir.ops import facts_of
from stagecut.ir.run.call import CallSpec
from stagecut.ir.run.objects import opened

MOST_RUNS = {True: 48, False: 12}
"""How often a model is run at most: for real, and on fake tensors."""

PARTS = 3
"""How many times as long the inputs become in a real run. It is odd, so that a dim of one element, which fits
any other, seldom fits by chance.
"""

PRIMES = (7, 11, 13, 17, 19, 23)
"""How many times as long they become on fake tensors: the first of these that divides no size of the model,
so that sizes tell where the samples went.
"""

Axes = dict[int, int | str]
"""Dims that go together: number of a flat input -> dim; or of a list, counted down from -1 -> ITEM."""


Longer = Mapping[str, int]
"""Name of a buffer -> the dim along which it holds samples, as many as the inputs have."""


NO_LONGER: Longer = MappingProxyType({})


@dataclass
class Example:
    """The example call: its flat inputs, how they are put together, and where its lists are."""

    flat: list[Any]
    build: Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    lists: dict[int, range] = field(default_factory=dict)

    @staticmethod
    def of(
        call: CallSpec | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Example | None:
        """None for a call that does not fit the trace."""
        if call is None:
            return Example(list(args), lambda flat: (tuple(flat), {}))
        try:
            flat = call.flatten(args, kwargs)
        except Exception as error:  # the default of a graph's placeholder
            raise_ours(error)
            return None
        found = Example(flat, lambda flat: tree_unflatten(list(flat), call.in_spec))
        positional, named = found.build(range(len(flat)))
        for number, item in enumerate((*positional, *named.values())):
            leaves = tree_leaves(item)
            if type(item) in (list, tuple) and _all_tensors(flat, leaves):
                found.lists[-1 - number] = range(leaves[0], leaves[-1] + 1)
        return found

    def size(self, key: int, dim: int | str) -> int:
        """The size of a dim, or the length of a list."""
        if key < 0:
            return len(self._list(key))
        return int(self.flat[key].shape[dim])

    def _list(self, key: int) -> list[Any]:
        positional, named = self.build(self.flat)
        return list((*positional, *named.values())[-1 - key])

    def longer(self, axes: Axes, times: int = PARTS) -> Any:
        """The call with these axes so many times as long: the samples of the example, and the first of them
        again and again.
        """
        return self._along(axes, lambda item, first: [item, *[first] * (times - 1)])

    def shaken(self) -> Example:
        """The same call with random numbers in the place of the floats."""
        flat = [
            torch.randn_like(item) if _is_float(item) else item for item in self.flat
        ]
        return replace(self, flat=flat)

    def first(self, axes: Axes) -> Any:
        """The call with the first sample in the place of all."""
        return self._along(axes, lambda item, first: [first])

    def _along(self, axes: Axes, parts: Callable[[Any, Any], list[Any]]) -> Any:
        flat = [
            torch.cat(parts(item, _first_along(item, dim)), dim)
            if isinstance(dim := axes.get(key), int)
            else item.detach().clone()
            if isinstance(item, torch.Tensor)
            else item
            for key, item in enumerate(self.flat)
        ]
        positional, named = self.build(flat)
        items = [*positional, *named.values()]
        for key in axes:
            if key < 0:
                kind, whole = type(items[-1 - key]), list(items[-1 - key])
                pieces = parts(whole, whole[:1] * len(whole))
                items[-1 - key] = kind(item for piece in pieces for item in piece)
        return tuple(items[: len(positional)]), dict(
            zip(named, items[len(positional) :], strict=True)
        )


def _is_float(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.is_floating_point()


def _all_tensors(flat: Sequence[Any], leaves: Sequence[int]) -> bool:
    return bool(leaves) and all(isinstance(flat[i], torch.Tensor) for i in leaves)


def _first_along(item: torch.Tensor, dim: int) -> torch.Tensor:
    """The first row in the place of all; floats are a bit smaller, so that one row is another one too."""
    rows = item.narrow(dim, 0, 1).expand(item.shape)
    return rows * 0.75 if _is_float(item) else rows


class Runs:
    """Runs copies of a model, as often as is allowed."""

    def __init__(self, module: nn.Module, inputs: Any, real: bool) -> None:
        self.module, self.inputs, self.real = module, inputs, real
        self._containers, around = ModelContainers(module), Surroundings(module)
        self._before = (Generators(around.generators), around, self._containers)
        self._left = MOST_RUNS[real]
        self._fake = None if real else FakeTensorMode(shape_env=ShapeEnv())
        if self._fake is not None:
            self._fake.allow_non_fake_inputs = True
        self._state: dict[int, torch.Tensor] = {}
        self._shaken = False
        self.parts = PARTS if real else self._prime()
        self.mixed = False
        """Whether an op of the last run computed along the samples. Seen on fake tensors only."""

    def _prime(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        tensors += [t for t in tree_leaves(self.inputs) if isinstance(t, torch.Tensor)]
        sizes = {size for tensor in tensors for size in tensor.shape}
        free = (p for p in PRIMES if not any(size and size % p == 0 for size in sizes))
        return next(free, PRIMES[-1])

    def shake(self, seed: int) -> None:
        """The parameters of the copies are random numbers from now on, or for 0 the model's."""
        torch.manual_seed(seed)
        self._shaken = seed > 0
        self._state.clear()

    def __call__(self, call: Any, longer: Longer = NO_LONGER) -> list[Any] | None:
        """The flat outputs of one call, with some buffers as many times as long as the inputs become; None
        where it fails.
        """
        if not self._left:
            return None
        self._left -= 1
        try:
            twin = self._twin(longer)
            torch.manual_seed(0)  # each run draws the same
            args, kwargs = tree_map(self._given, call)
            with giving_sizes(twin, self.inputs), _Steady(), self._around():
                result = twin(*args, **kwargs)
            return [_own(leaf) for leaf in tree_flatten(opened(result))[0]]
        except Exception as error:  # whatever the code of a model raises
            raise_ours(error)
            return None
        finally:
            self._restore()

    def _restore(self) -> None:
        for before in self._before:
            before.restore()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """While open, the model can be run. It, and all that it refers to or draws from, stays as it is. What
        it prints is not shown.
        """
        with (
            quiet_torch(),
            redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            torch.random.fork_rng(gpus(self.module, self.inputs)),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def _around(self) -> Iterator[None]:
        if self._fake is None:
            yield
            return
        with self._fake, _Mixing(self.parts) as mixing:
            yield
        self.mixed = mixing.found

    def _twin(self, longer: Longer) -> nn.Module:
        """A copy of the model. Its parameters are copied once for all runs."""
        memo: dict[int, Any] = {}
        for parameter in self.module.parameters():
            if id(parameter) not in self._state:
                self._state[id(parameter)] = self._copy(parameter)
                if self._shaken and _is_float(parameter):
                    self._state[id(parameter)].data.normal_()
            memo[id(parameter)] = self._state[id(parameter)]
        for name, buffer in self.module.named_buffers():
            whole = buffer
            if (dim := longer.get(name)) is not None:
                whole = torch.cat([buffer] * self.parts, dim)
            memo[id(buffer)] = self._copy(whole)
        for part in self._containers.parts():
            if isinstance(part, torch.Tensor) and not part.is_leaf:  # kept from a call
                memo[id(part)] = part.detach().clone()
        twin: nn.Module = copy.deepcopy(self.module, memo)
        _steady(twin)
        return twin

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._fake is not None:
            return self._fake.from_tensor(tensor, static_shapes=True)
        return copy.deepcopy(tensor.detach()).requires_grad_(tensor.requires_grad)

    def _given(self, leaf: Any) -> Any:
        if self._fake is None or not isinstance(leaf, torch.Tensor):
            return leaf
        return self._fake.from_tensor(leaf, static_shapes=True)


def _own(leaf: Any) -> Any:
    """A result without its history."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class _Mixing(TorchDispatchMode):
    """Notices an op that computes along a dim whose size is a multiple of a number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        sizes = sizes_mixed_by(func, args)
        self.found |= any(
            isinstance(size, int) and size and size % self._number == 0
            for size in sizes
        )
        return func(*args, **(kwargs or {}))


def sizes_mixed_by(target: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The sizes along which an op surely mixes: attention along its keys, a softmax or a running sum along
    its dim, a convolution along all but the first two.
    """
    known = facts_of(str(getattr(target, "_opname", "")))
    if not (known.along_keys or known.along_dim or known.in_space):
        return ()
    shapes = [item.shape if isinstance(item, torch.Tensor) else () for item in args]
    if known.along_keys:
        return shapes[1][-2:-1]
    if known.along_dim:
        return [shapes[0][args[1]]] if shapes[0] else ()
    return shapes[0][2:]


def _steady(model: nn.Module) -> None:
    """torch's own modules in `model` draw nothing, and their norms take the statistics that they have."""
    for module in model.modules():
        if isinstance(module, (_DropoutNd, _BatchNorm)):
            module.training = False
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0


class _Steady(TorchFunctionMode):
    """While open, the same holds for torch's functions."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = args[:4] + tuple(0.0 for _ in args[4:5]) + args[5:]
            kwargs |= {} if len(args) > 4 else {"dropout_p": 0.0}
        if func is F.batch_norm and len(args) > 5 and args[1] is not None:
            args = (*args[:5], False, *args[6:])
        return func(*args, **kwargs)


_DROPOUTS = frozenset(
    getattr(F, name)
    for name in (
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
    ).split()
)
