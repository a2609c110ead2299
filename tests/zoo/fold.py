"""Traces every architecture of the zoo, each made longer, with and without `fold`, and compares the texts of the programs."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from zoo.models import ARCHITECTURES, Architecture

from stagecut import StagecutError
from stagecut.frontend.capture.batch import mark_batches
from stagecut.frontend.marks import AGAIN
from stagecut.ir.text.printer import text
from stagecut.pipe import lower

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layers", "encoder_layers", "decoder_layers")
COUNT = 6
"""How many layers the models get that take so many: the first ones of a kind are traced in any case."""


def main() -> int:
    """1 when the texts of any architecture differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these architectures or families")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    words: Counter[str] = Counter()
    start = time.perf_counter()
    for architecture in ARCHITECTURES:
        if only and not {architecture.name, architecture.family} & {*only}:
            continue
        longer = _longer(architecture)
        for mode in architecture.modes:
            word, more = _compared(longer, mode == "train")
            words[word] += 1
            _say(f"{architecture.name:50}{mode:6} {word} {more}")
    _say(f"{dict(words)}, {time.perf_counter() - start:.0f} s")
    return 1 if words["DIFFERENT"] else 0


def _longer(architecture: Architecture) -> Architecture:
    """The architecture with COUNT layers where it can be made so."""
    longer = {key: COUNT for key in LAYERS if isinstance(architecture.config.get(key), int)}
    try:
        torch.manual_seed(0)
        model = replace(architecture, config={**architecture.config, **longer})
        with torch.no_grad():
            model.make().eval()(**model.inputs())
    except Exception:  # whatever the code of a model raises
        return architecture
    return model


def _compared(architecture: Architecture, training: bool) -> tuple[str, str]:
    folded, calls = _outcome(architecture, training, True)
    whole, _ = _outcome(architecture, training, False)
    if folded != whole:
        # the code of a model may keep what it made for the next model of its class
        folded, calls = _outcome(architecture, training, True)
    if folded == whole:
        return ("folded" if calls else "equal"), f"{calls} calls"
    lines = ("\n".join(outcome).splitlines() for outcome in (folded, whole))
    return "DIFFERENT", "\n".join([*difflib.unified_diff(*lines, lineterm="", n=0)][:8])


def _outcome(architecture: Architecture, training: bool, fold: bool) -> tuple[list[str], int]:
    """The text of the program with its notes, or the error; and how many calls were not traced by themselves."""
    torch.manual_seed(0)
    model, inputs = architecture.make().train(training), architecture.inputs()
    if architecture.warm:
        with torch.no_grad():
            model(**inputs)
    try:
        program, bindings, exported = lower(model, (), inputs, None, architecture.leaves, batches=False, fold=fold)
    except StagecutError as error:
        return [f"{type(error).__name__}: {error}"], 0
    calls = 0
    if exported is not None:
        calls = sum(AGAIN in node.meta for node in exported.graph.nodes)
        # a larger model has no other runs than these
        mark_batches(program, model, bindings.call, (), inputs, exported, real=False, fold=fold)
    return [text(program), *bindings.notes], calls


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
