"""The compiler on one screen: the passes in order, and why each stands where it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stagecut.ir.errors import PassError, nearest
from stagecut.passes.base import Pass
from stagecut.passes.canonicalize import Canonicalize
from stagecut.passes.find_splits import FindSplits
from stagecut.passes.infer_gradients import InferGradients
from stagecut.passes.liveness import Liveness
from stagecut.passes.partition import Partition
from stagecut.passes.place_lanes import PlaceLanes
from stagecut.passes.rebase_views import RebaseViews
from stagecut.passes.recompute import Recompute
from stagecut.passes.resolve_aliases import ResolveAliases
from stagecut.passes.route import Route
from stagecut.passes.share_state import ShareState
from stagecut.passes.version_mutations import VersionMutations

PASSES: tuple[type[Any], ...] = (
    Canonicalize,  # first: everything after sees only ops that matter
    ResolveAliases,  # before versions: a write through one name of a tensor is a write to all of them
    VersionMutations,  # before anything moves: program order is still that of the user's code
    InferGradients,  # after versions: a write can make a value carry gradient
    FindSplits,  # after the rest has settled: positions mean ops that stay
    Partition,  # from here on ops have stages
    Recompute,  # before anything is computed from the crossing values: fewer cross afterwards
    RebaseViews,  # before anything is computed from the crossing values: it changes them
    ShareState,  # needs stages; before liveness, because state that is held does not cross
    Liveness,  # which values cross
    Route,  # how they cross; links the program
    PlaceLanes,  # last: it only says where state of the caller's is touched
)

ORDER = (
    ("resolve-aliases", "version-mutations"),
    ("canonicalize", "find-splits"),
    ("version-mutations", "infer-gradients"),
    ("version-mutations", "partition"),
    ("find-splits", "partition"),
    ("infer-gradients", "recompute"),
    ("partition", "recompute"),
    ("recompute", "rebase-views"),
    ("rebase-views", "share-state"),
    ("share-state", "liveness"),
    ("liveness", "route"),
    ("route", "place-lanes"),
)
"""Pairs (before, after) that must hold in PASSES."""

NAMES = tuple(each.name for each in PASSES)
if any(NAMES.index(first) >= NAMES.index(second) for first, second in ORDER):
    raise PassError("the order of passes breaks an ordering constraint")


def default_pipeline(*chosen: Pass) -> list[Pass]:
    """All passes in order: those in `chosen` as given, the others without options."""
    by_type = {type(each): each for each in chosen}
    return [by_type[each] if each in by_type else each() for each in PASSES]


def pass_by_name(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """The pass called `name`, with its options set. Raises PassError for unknown names and options."""
    if name not in NAMES:
        raise PassError(f"unknown pass '{name}'", hint=nearest(name, NAMES))
    pass_type = PASSES[NAMES.index(name)]
    allowed = [field.name for field in fields(pass_type)]
    for option in options or {}:
        if option not in allowed:
            raise PassError(
                f"pass '{name}' has no option '{option}'",
                hint=nearest(option, allowed),
            )
    chosen: Pass = pass_type(**(options or {}))
    return chosen
