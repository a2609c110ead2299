"""Runs of a model on more samples than its example has.

A model that is cheap to run is run for real, on the CPU: on a GPU an index that does not fit more samples
would end the process's use of it. Another one is run on fake tensors, which have sizes and no values. The
model is not changed, and neither is what it draws from or refers to.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import chain
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
from torch.utils._pytree import tree_leaves

from stagecut.frontend.capture.example import giving_sizes
from stagecut.frontend.capture.quiet import quiet_torch
from stagecut.frontend.fold.results import CutHistory
from stagecut.frontend.fold.runs import RepeatedRuns
from stagecut.frontend.source import gpus
from stagecut.frontend.watch.attributes import ModelContainers, copied
from stagecut.frontend.watch.generators import Generators
from stagecut.frontend.watch.globals import Surroundings
from stagecut.ir.blame import raise_ours
from stagecut.ir.ops import facts_of
from stagecut.ir.run.call import CallSpec
from stagecut.ir.run.given import (
    GivenObjects,
    mapped,
    opened_arguments,
    put_in,
)

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

Axis = tuple[int, int | str]
"""A dim of an input: number of a flat input, dim; or of a list, counted down from -1, ITEM."""

Axes = dict[int, int | str]
"""Dims that go together, by input."""

Longer = Mapping[str, int]
"""Name of a buffer -> the dim along which it holds samples, as many as the inputs have."""


NO_LONGER: Longer = MappingProxyType({})


Parts = Callable[[Any, Any], list[Any]]
"""A function of the rows of an input and of its first row in the place of all: what is put together."""


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
        example = Example(flat, lambda flat: put_in(flat, call.in_spec))
        example.lists = dict(example._lists_of_tensors())
        return example

    def _lists_of_tensors(self) -> Iterator[tuple[int, range]]:
        """Number of a list -> the flat inputs that are in it."""
        places = range(len(self.flat))
        for number, tree in enumerate(self._arguments(places)):
            if type(tree) not in (list, tuple):
                continue
            leaves = tree_leaves(tree)
            if not leaves:
                continue
            if not all(_is_tensor(self.flat[place]) for place in leaves):
                continue
            first = leaves[0]
            last = leaves[-1]
            yield -1 - number, range(first, last + 1)

    def _arguments(self, flat: Sequence[Any]) -> list[Any]:
        positional, named = self.build(flat)
        return [*positional, *named.values()]

    def size(self, key: int, dim: int | str) -> int:
        """The size of a dim, or the length of a list."""
        if key < 0:
            arguments = self._arguments(self.flat)
            return len(arguments[-1 - key])
        shape = self.flat[key].shape
        return int(shape[dim])

    def longer(self, axes: Axes, times: int = PARTS) -> Any:
        """The call with these axes so many times as long: the samples of the example, and the first of them
        again and again.
        """

        def parts(rows: Any, first: Any) -> list[Any]:
            others = [first] * (times - 1)
            return [rows, *others]

        return self._along(axes, parts)

    def shaken(self) -> Example:
        """The same call with random numbers in the place of the floats."""
        flat: list[Any] = []
        for leaf in self.flat:
            if _is_float(leaf):
                leaf = torch.randn_like(leaf)
            flat.append(leaf)
        return replace(self, flat=flat)

    def first(self, axes: Axes) -> Any:
        """The call with the first sample in the place of all."""
        return self._along(axes, lambda rows, first: [first])

    def _along(self, axes: Axes, parts: Parts) -> Any:
        """The call with `parts` of the rows, and of the first in the place of all, along these axes."""
        flat: list[Any] = []
        for key, leaf in enumerate(self.flat):
            dim = axes.get(key)
            if isinstance(dim, int):
                pieces = parts(leaf, _first_along(leaf, dim))
                leaf = torch.cat(pieces, dim)
            elif isinstance(leaf, torch.Tensor):
                leaf = leaf.detach().clone()
            flat.append(leaf)
        positional, named = self.build(flat)
        arguments = [*positional, *named.values()]
        for key in axes:
            if key < 0:
                place = -1 - key
                arguments[place] = _items_along(arguments[place], parts)
        args = tuple(arguments[: len(positional)])
        values = arguments[len(positional) :]
        return args, dict(zip(named, values, strict=True))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _items_along(whole: Any, parts: Parts) -> Any:
    """A list with `parts` of its items, and of the first in the place of all."""
    kind = type(whole)
    items = list(whole)
    firsts = items[:1] * len(items)
    pieces = parts(items, firsts)
    return kind(chain.from_iterable(pieces))


def _first_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The first row in the place of all; floats are a bit smaller, so that one row is another one too."""
    first = tensor.narrow(dim, 0, 1)
    rows = first.expand(tensor.shape)
    if not _is_float(tensor):
        return rows
    return rows * 0.75


class Runs:
    """Runs copies of a model, as often as is allowed. With `fold`, a block that the model repeats runs twice
    on fake tensors, and its further calls return what those have returned.
    """

    def __init__(
        self, module: nn.Module, inputs: Any, real: bool, fold: bool = False
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.real = real
        self.moved = real and _on_accelerator(module, inputs)
        """Whether the model is run on the CPU, and is elsewhere."""
        self._containers = ModelContainers(module)
        around = Surroundings(module)
        generators = Generators(around.generators)
        self._before = (generators, around, self._containers)
        self._left = MOST_RUNS[real]
        self._fake = None if real else _fake_mode()
        self._fold = fold and not real
        self._state: dict[int, torch.Tensor] = {}
        self._shaken = False
        self.parts = PARTS if real else self._prime()
        self.mixed = False
        """Whether an op of the last run computed along the samples. Seen on fake tensors only."""

    def _prime(self) -> int:
        """The first of PRIMES that divides no size of the model and its inputs, or the last."""
        sizes: set[int] = set()
        inputs = tree_leaves(opened_arguments(self.inputs))
        for leaf in (*self.module.parameters(), *self.module.buffers(), *inputs):
            if isinstance(leaf, torch.Tensor):
                sizes.update(leaf.shape)
        for prime in PRIMES:
            if not any(_is_multiple(size, prime) for size in sizes):
                return prime
        return PRIMES[-1]

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
            return self._outputs(call, longer)
        except CutHistory:
            self._fold = False
            self._left += 1
            return self(call, longer)

    def _outputs(self, call: Any, longer: Longer) -> list[Any] | None:
        try:
            twin = self._twin(longer)
            torch.manual_seed(0)  # each run draws the same
            args, kwargs = mapped(self._as_argument, call)
            given = GivenObjects(args, kwargs)
            with giving_sizes(twin, self.inputs), _Steady(), self._around(twin):
                result = twin(*args, **kwargs)
            leaves = tree_leaves(given.outcome(result))
            return [_without_history(leaf) for leaf in leaves]
        except CutHistory:
            raise
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
    def _around(self, twin: nn.Module) -> Iterator[None]:
        if self._fake is None:
            yield
            return
        repeats = RepeatedRuns(twin).open() if self._fold else nullcontext()
        with self._fake, _Mixing(self.parts) as mixing, repeats:
            yield
        self.mixed = mixing.seen

    def _twin(self, longer: Longer) -> nn.Module:
        """A copy of the model. Its parameters are copied once for all runs."""
        memo: dict[int, Any] = {}
        for parameter in self.module.parameters():
            memo[id(parameter)] = self._twin_parameter(parameter)
        for name, buffer in self.module.named_buffers():
            whole = buffer
            if name in longer:
                whole = torch.cat([buffer] * self.parts, longer[name])
            memo[id(buffer)] = self._copy(whole)
        for part in self._containers.parts():
            if not isinstance(part, torch.Tensor):
                continue
            if self.moved:
                memo[id(part)] = part.detach().cpu()
            elif not part.is_leaf:  # kept from a call
                memo[id(part)] = part.detach().clone()
        twin = copied(self.module, memo)
        _steady(twin)
        return twin

    def _twin_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        key = id(parameter)
        if key not in self._state:
            twin = self._copy(parameter)
            if self._shaken and _is_float(parameter):
                twin.data.normal_()
            self._state[key] = twin
        return self._state[key]

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._fake is not None:
            return self._fake.from_tensor(tensor, static_shapes=True)
        plain = tensor.detach()
        twin = plain.cpu() if self.moved else copy.deepcopy(plain)
        return twin.requires_grad_(tensor.requires_grad)

    def _as_argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if self._fake is None:
            return leaf.cpu() if self.moved else leaf
        return self._fake.from_tensor(leaf, static_shapes=True)


def _on_accelerator(module: nn.Module, inputs: Any) -> bool:
    leaves = tree_leaves(opened_arguments(inputs))
    tensors = (*module.parameters(), *module.buffers(), *leaves)
    devices = {leaf.device.type for leaf in tensors if isinstance(leaf, torch.Tensor)}
    return not devices <= {"cpu", "meta"}


def _fake_mode() -> FakeTensorMode:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    mode.allow_non_fake_inputs = True
    return mode


def _without_history(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach()


def _is_multiple(size: Any, number: int) -> bool:
    """True for a size of some multiples of a number; a symbol is none."""
    if not isinstance(size, int) or not size:
        return False
    return size % number == 0


class _Mixing(TorchDispatchMode):
    """Notices an op that computes along a dim whose size is a multiple of a number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for size in sizes_mixed_by(func, args):
            if _is_multiple(size, self._number):
                self.seen = True
        return func(*args, **(kwargs or {}))


def sizes_mixed_by(target: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The sizes along which an op surely mixes: attention along its keys, a softmax or a running sum along
    its dim, a convolution along all but the first two.
    """
    name = getattr(target, "_opname", "")
    facts = facts_of(str(name))
    if facts.along_keys:
        keys = _shape(args[1])
        return keys[-2:-1]
    if not facts.along_dim and not facts.in_space:
        return ()
    shape = _shape(args[0])
    if facts.in_space:
        return shape[2:]
    if not shape:
        return ()
    return [shape[args[1]]]


def _shape(item: Any) -> Sequence[Any]:
    if not isinstance(item, torch.Tensor):
        return ()
    return item.shape


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
            if args:
                return args[0]
            return kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        if func is F.batch_norm and len(args) > 5 and args[1] is not None:
            args = (*args[:5], False, *args[6:])
        return func(*args, **kwargs)


_DROPOUTS = frozenset(
    getattr(F, name)
    for name in (
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
    ).split()
)
