"""Parameters whose class is one of torch's subclasses of tensors, such as quantised weights: an export takes
them apart into the plain tensors inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_PLACE = ("nn_module_stack", "stack_trace", "torch_fn")
"""Keys in the meta of a node that say where it stands in the model."""


def access_where_used(graph: fx.Graph) -> None:
    """Every tensor inside a parameter is taken out right before each op that reads it, and in its module.

    torch.export takes all of them out before the first op. There, the first stage would hold every parameter,
    and send what is inside to the others.
    """
    access: Any = torch.ops.export.access_subclass_inner_tensor.default
    # later ones first: what is inside of a tensor may have tensors inside too
    for node in reversed(graph.find_nodes(op="call_function", target=access)):
        for user in [*node.users]:
            with graph.inserting_before(user):
                own = graph.node_copy(node, lambda operand: operand)
            own.meta |= {key: user.meta[key] for key in _PLACE if key in user.meta}
            user.replace_input_with(node, own)
        graph.erase_node(node)
