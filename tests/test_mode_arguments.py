"""The table of ops with a training flag says what torch's own schemas say."""

from __future__ import annotations

import torch

from stagecut.frontend.lower import MODE_ARGUMENT

FLAGS = ("train", "training", "use_input_stats")

NEVER_TRACED = ("_backward", "_functional", "_impl_index", "_no_training", "_with_noise", "_legit", "_state")
"""What torch calls by itself, below the place where a trace is made."""
BACKENDS = ("cudnn", "miopen", "mkldnn", "mps", "quantized")


def flags() -> dict[str, int]:
    """Every op of torch's with a training flag -> where that stands; none that writes to out=, none of a single backend."""
    found: dict[str, int] = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten" or "out" in schema.overload_name or any(word in name for word in (*NEVER_TRACED, *BACKENDS)):
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.name in FLAGS:
                found[f"aten.{name}.{schema.overload_name or 'default'}"] = position
    return found


def test_the_table_is_that_of_torchs_schemas() -> None:
    """An op that is missing would not switch, without a word; so would one with another position."""
    assert flags() == MODE_ARGUMENT
    assert len(MODE_ARGUMENT) > 20


def test_every_flag_is_a_bool() -> None:
    """A flag that may be None is given as a bool by whoever gives it."""
    for name, position in MODE_ARGUMENT.items():
        _, op, overload = name.split(".")
        argument = getattr(getattr(torch.ops.aten, op), overload)._schema.arguments[position]
        assert str(argument.type) in ("bool", "Optional[bool]"), name
