"""Which ops reach the device in one forward and backward, of a model and of its pipe: `python tests/zoo/calls.py [NAME ...]`."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.cuts import cut_points
from zoo.models import ARCHITECTURES, Architecture

from stagecut import SplitPoint, pipeline
from stagecut.ir.run.objects import opened

DOZEN = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM",
    "BertForMaskedLM", "DistilBertForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
    "ViTForImageClassification", "ConvNextForImageClassification", "MambaForCausalLM",
)  # fmt: skip
"""Architectures of each kind whose kernels a test compares."""

MADE_ONCE = "aten.lift_fresh_copy.default"
"""A tensor made of Python's numbers: the model makes it in each call, on the host; a stage copies it where it lies."""


class Calls(TorchDispatchMode):
    """Counts the ops that start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func, result, args):
            self.counts[str(func)] += 1
        return result


def _is_view(func: Any, result: Any, args: Any) -> bool:
    """True for an op that only looks at memory that is there."""
    if func._schema.is_mutable:
        return False
    storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return bool(results) and all(leaf.untyped_storage()._cdata in storages for leaf in results)


def calls(module: Callable[..., Any], inputs: dict[str, Any]) -> Counter[str]:
    """The ops of one forward and one backward, by name."""
    with Calls() as seen:
        torch.manual_seed(0)
        output = module(**inputs)
        leaves = [leaf for leaf in tree_leaves(opened(output)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        torch.stack([leaf.float().mean() for leaf in leaves]).mean().backward()
    return seen.counts


def difference(model: nn.Module, pipe: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Op -> how often the model runs it, how often the pipe does, where that differs."""
    for module in (model, pipe):
        module.zero_grad()
    ours, theirs = calls(pipe, inputs), calls(model, inputs)
    return {name: (theirs[name], ours[name]) for name in sorted(ours | theirs) if ours[name] != theirs[name]}


def compared(architecture: Architecture, training: bool = False) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Where a model and its pipe of two stages differ in the ops they run, and the notes of the pipe.

    Without attention masks: a model that is given one looks whether it hides anything, and no trace can.
    """
    torch.manual_seed(0)
    model = architecture.make().train(training)
    inputs = {name: item for name, item in architecture.inputs().items() if "attention_mask" not in name}
    points = cut_points(model, inputs, 2, architecture.leaves) or ()
    spec = dict.fromkeys(points, SplitPoint.BEGINNING)
    pipe = pipeline(model, mb_kwargs=inputs, split_spec=spec, leaf_modules=architecture.leaves, check=None)
    return difference(deepcopy(model), pipe.module(), inputs), pipe.notes


def more_in_the_pipe(found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The ops that the pipe runs more often than the model."""
    return {name: pair for name, pair in found.items() if pair[1] > pair[0] and name != MADE_ONCE}


def main(names: Sequence[str]) -> None:
    """Prints a line for each architecture: how many ops the model runs more, how many the pipe does, and which."""
    warnings.simplefilter("ignore")
    for architecture in ARCHITECTURES:
        if names and architecture.name not in names:
            continue
        try:
            found, notes = compared(architecture)
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            sys.stdout.write(f"{architecture.name:40} {line[:200]}\n")
            continue
        more = more_in_the_pipe(found)
        fewer = {name: pair for name, pair in found.items() if pair[1] < pair[0]}
        counts = f"{sum(b - a for a, b in more.values()):5} more {sum(a - b for a, b in fewer.values()):5} fewer"
        which = " ".join(f"{name.removeprefix('aten.').removesuffix('.default')}:{a}->{b}" for name, (a, b) in (more | fewer).items())
        sys.stdout.write(f"{architecture.name:40} {counts}  {which}\n")
        for note in notes:
            sys.stdout.write(f"    {note[:300]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
