"""Cuts that were measured or searched are the same on all ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from stagecut.backend.costs.balance import Balanced
from stagecut.backend.costs.plan import Plan
from stagecut.backend.schedules import digest_of
from stagecut.ir.graph import Program
from stagecut.ir.text.printer import fingerprint


def shared_plan(program: Program, policy: Balanced, search: Callable[[], Plan]) -> Plan:
    """The plan that `search` gives, or the one that the first process of the job got by the same policy for
    the same program.

    Two processes that time ops do not get the same numbers, and cut in other places. The first one to be
    ready decides for all, through the store of the process group: nobody waits for a rank that cuts nothing.
    """
    if not dist.is_available() or not dist.is_initialized():
        return search()
    assert dist.group.WORLD is not None
    store: Any = dist.group.WORLD.get_group_store()
    order = digest_of(policy.setting.order)  # which the text of a setting leaves out
    key = f"stagecut/plan/{fingerprint(program)}/{policy!r}/{order}"
    if not store.check([key]):
        pickled = pickle.dumps(search()).hex()
        return _read(store.compare_set(key, "", pickled))
    return _read(store.get(key))


def _read(text: bytes) -> Plan:
    # only processes of this job write to the store
    plan: Plan = pickle.loads(bytes.fromhex(text.decode()))
    return plan
