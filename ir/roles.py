"""The roles of a stage: what it computes forward, the gradients that it hands back, those of its weights.

A joint block computes all three. It takes the primals (state and inputs of the stage) and a tangent for each
result that carries gradient. It returns the results, the written state, and a gradient for each primal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagecut.ir.graph import Block, Value


@dataclass(frozen=True)
class Joint:
    """A stage and its backward in one block.

    results: how many outputs of the block are results of the stage; as many gradients as there are primals
    follow them, None where none is wanted. tangents: the place of each tangent's result among the results.
    weights: the places of the primals whose gradients are those of weights.
    """

    block: Block
    results: int
    tangents: tuple[int, ...]
    weights: frozenset[int]

    @property
    def primals(self) -> Sequence[Value]:
        """The state and the inputs of the stage."""
        return self.block.inputs[: len(self.block.inputs) - len(self.tangents)]

    @property
    def cotangents(self) -> Sequence[Value]:
        """The gradients of the results, as the next stage hands them back."""
        return self.block.inputs[len(self.primals) :]

    @property
    def gradients(self) -> Sequence[Value | None]:
        """For each primal, its gradient; None where none is wanted."""
        gradients: Sequence[Value | None] = self.block.outputs[self.results :]
        return gradients


@dataclass(frozen=True)
class Roles:
    """The three blocks that a joint block was split into. Each reads primals, tangents, and outputs of the
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
