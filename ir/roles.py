"""The roles of a stage: what it computes forward, the gradients that it hands back, those of its weights.

A joint block computes all three. It takes the primals (state and inputs of the stage) and a tangent for each
result that carries gradient. It returns the results, and then a gradient for each primal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagecut.ir.graph import Block, Value


@dataclass(frozen=True)
class Joint:
    """A stage and its backward in one block.

    primals: the state and the inputs of the stage. cotangents: the gradients of its results, as they arrive;
    tangents: the place of the result of each. results: how many outputs of the block are results; as many
    gradients as there are primals follow them, None where none is wanted. weights: the places of the primals
    whose gradients are those of weights.
    """

    block: Block
    primals: Sequence[Value]
    cotangents: Sequence[Value]
    tangents: tuple[int, ...]
    results: int
    weights: frozenset[int]

    @property
    def gradients(self) -> Sequence[Value | None]:
        """For each primal, its gradient; None where none is wanted."""
        gradients: Sequence[Value | None] = self.block.outputs[self.results :]
        return gradients


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
