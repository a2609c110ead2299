"""The roles of a stage: what it computes forward, the gradients that it hands back, those of its weights.

A joint block computes all three. It takes the primals (state and inputs of the stage) and a tangent for each
result that carries gradient. It returns the results, and then a gradient for each primal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stagecut.ir.aliases import Aliases
from stagecut.ir.graph import Block, StateEntry, Value
from stagecut.ir.types import storage_bytes


@dataclass(frozen=True)
class Joint:
    """A stage and its backward in one block.

    primals: the state and the inputs of the stage. cotangents: the gradients of its results, as they arrive;
    tangents: the place of the result of each. results: how many outputs of the block are results; as many
    gradients as there are primals follow them, None where none is wanted. weights: the places of the primals
    whose gradients are those of weights. resident: those of the primals that lie in memory whatever is saved.
    """

    block: Block
    primals: Sequence[Value]
    cotangents: Sequence[Value]
    tangents: tuple[int, ...]
    results: int
    weights: frozenset[int]
    resident: frozenset[int] = frozenset()

    @property
    def gradients(self) -> Sequence[Value | None]:
        """For each primal, its gradient; None where none is wanted."""
        gradients: Sequence[Value | None] = self.block.outputs[self.results :]
        return gradients

    def storages(self) -> Storages:
        """Which values of the block share memory."""
        return Storages(self)


class Storages:
    """The memory of the values of a joint block. The first value in a memory is the root of all in it."""

    def __init__(self, joint: Joint) -> None:
        block = joint.block
        self._aliases = Aliases(block.ops, roots=[*block.inputs, *joint.primals])
        self._resident = {joint.primals[place] for place in joint.resident}

    def root(self, value: Value) -> Value | None:
        """The root of a value; None where it lies in memory whatever is saved."""
        root = self._aliases.root(value)
        is_constant = isinstance(root.owner, StateEntry) and root.owner.kind == "const"
        return None if is_constant or root in self._resident else root

    def roots(self, values: Iterable[Value]) -> list[Value]:
        """The roots of some values, each once, but for those that lie in memory anyway."""
        roots = dict.fromkeys(self.root(value) for value in values)
        return [root for root in roots if root is not None]


@dataclass(frozen=True)
class Flight:
    """The largest numbers of micro-batches between two steps of a stage. inputs: between the forward and the
    gradients of its inputs. gradients: between these and the gradients of its weights. weights: between the
    forward and the gradients of its weights.
    """

    inputs: int = 1
    gradients: int = 1
    weights: int = 1


@dataclass(frozen=True)
class Saved:
    """Bytes that one micro-batch of a stage leaves in memory, each storage counted once. Neither weights nor
    inputs of the model count.

    inputs: what the forward saves for the gradients of the inputs alone. weights: what it saves for those of
    the weights. gradients: what the backward for the inputs computes or receives, and leaves to the weights.
    """

    inputs: int = 0
    weights: int = 0
    gradients: int = 0

    @staticmethod
    def of(kinds: Mapping[Value, str]) -> Saved:
        """That of some roots, each of which is of one of these kinds."""
        sums = dict.fromkeys(KINDS, 0)
        for root, kind in kinds.items():
            sums[kind] += storage_bytes(root.type)
        return Saved(**sums)

    @property
    def forward(self) -> int:
        """What the forward saves."""
        return self.inputs + self.weights

    def __add__(self, other: Saved) -> Saved:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Saved) -> Saved:
        return self._with(other, lambda a, b: a - b)

    def part(self, number: int, of: int) -> Saved:
        """So many of so many parts, in whole bytes."""
        return self._with(self, lambda a, _: a * number // of)

    def or_longer(self, other: Saved) -> Saved:
        """One value, as two readers hold it: as long as the one that holds it longer."""
        if self.weights or other.weights:
            return Saved(weights=max(self.forward, other.forward))
        return self._with(other, max)

    def _with(self, other: Saved, combined: Callable[[int, int], int]) -> Saved:
        return Saved(
            combined(self.inputs, other.inputs),
            combined(self.weights, other.weights),
            combined(self.gradients, other.gradients),
        )

    def during(self, flight: Flight) -> int:
        """The most that lies in memory with so many micro-batches in flight."""
        return (
            self.inputs * flight.inputs
            + self.weights * flight.weights
            + self.gradients * flight.gradients
        )


KINDS = ("inputs", "weights", "gradients")
"""The kinds of what lies in memory, as `Saved` has them."""

NOTHING = Saved()


@dataclass(frozen=True)
class Budget:
    """What a stage may keep in memory for its backward: so many bytes with all micro-batches in flight; or as
    a float, a part of the way from the least that can be kept, 0.0, to all that its backward reads, 1.0.
    """

    limit: int | float
    flight: Flight = Flight()


@dataclass(frozen=True)
class Roles:
    """The three blocks that a joint block was split into. Each reads primals, cotangents, and outputs of the
    blocks before it.

    forward returns the results, then the values saved for the backward. backward_input returns the gradients
    of inputs, then the values saved for the weights. backward_weight returns the gradients of weights.
    """

    joint: Joint
    forward: Block
    backward_input: Block
    backward_weight: Block

    @property
    def saved(self) -> list[Value]:
        """The values that lie in memory from the forward to the backward, primals among them."""
        known = dict.fromkeys([*self.joint.primals, *self.forward.outputs])
        blocks = (self.backward_input, self.backward_weight)
        read = {value for block in blocks for value in block.inputs}
        return [value for value in known if value in read]

    @property
    def lying(self) -> dict[Value, str]:
        """The roots of the values that one micro-batch leaves in memory, with their kinds."""
        storages = self.joint.storages()
        saved = storages.roots(self.saved)
        for_weights = storages.roots(self.backward_weight.inputs)
        kinds = dict.fromkeys(for_weights, "gradients")
        kinds |= dict.fromkeys(saved, "inputs")
        kinds |= {root: "weights" for root in for_weights if kinds[root] == "inputs"}
        return kinds

    @property
    def memory(self) -> Saved:
        """What one micro-batch leaves in memory. The sizes in the block are known."""
        return Saved.of(self.lying)
