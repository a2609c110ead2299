"""Ranks that built the model with other random numbers: their stages together are no model that one of them
built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist

from stagecut.backend.ranks.agree import digest, everywhere
from stagecut.backend.stages.sampled import is_as_sampled, sampled
from stagecut.backend.stages.staged import Staged


def built_otherwise(pipe: Staged, group: dist.ProcessGroup | None) -> dict[int, int]:
    """Place in the state of the program -> another rank whose model had other values there when it was cut.
    Every rank calls it.
    """
    own = pipe._built
    if len(set(everywhere(digest(repr(own)), group))) == 1:
        return {}
    ranks: dict[int, int] = {}
    for rank, other in enumerate(everywhere(own, group)):
        for place in own.keys() & other.keys():
            # as texts, in which NaN equals NaN
            if repr(other[place]) != repr(own[place]):
                ranks.setdefault(place, rank)
    return ranks


def notes_on_mixture(
    pipe: Staged, stages: Sequence[int], ranks: Mapping[int, int]
) -> Iterator[str]:
    """What is to be noted about these stages of a rank, where they still have the values of its model.
    `ranks`: as `built_otherwise` returns them.
    """
    now = sampled(pipe.program, [pipe.stages[index] for index in stages])
    mixed: dict[str, int] = {}
    for place in sorted(ranks.keys() & now.keys()):
        if is_as_sampled(pipe._built[place], now[place]):
            mixed[pipe.program.state[place].name] = ranks[place]
    if not mixed:
        return
    name, rank = next(iter(mixed.items()))
    others = len(mixed) - 1
    more = f" and {others} more tensor{'s' if others > 1 else ''}" if others else ""
    yield (
        f"the stages of this rank have '{name}'{more} as it built the model, and rank {rank} built the model "
        "with other values\n"
        "  try: seed every rank alike before the model is made, or load the same weights on each"
    )
