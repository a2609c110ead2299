"""A group of hosts beside a group of devices: only its own ranks make it, and it breaks as the other does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cluster.matrix import on_ranks

from stagecut import StagecutError
from stagecut.backend.ranks.faults import _break_connections
from stagecut.backend.ranks.hosts import gloo_group, group_of_hosts


def test_two_pipelines_make_groups_of_hosts_of_their_own() -> None:
    assert on_ranks(4, _talk) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def _talk() -> list[int]:
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    assert group_of_hosts(group) is group  # gloo has no device to wait for
    assert group_of_hosts(None) is dist.group.WORLD
    rows = []
    for _ in range(2 if rank < 2 else 1):  # the other pipeline does not wait for the second group
        hosts = gloo_group(group)
        rows = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
        dist.all_gather(rows, torch.tensor([rank]), group=hosts)
    return [int(row) for row in rows]


def test_a_group_of_hosts_breaks_for_all_its_ranks() -> None:
    assert on_ranks(2, _broken) == ["broken", "broken"]


def _broken() -> str:
    assert dist.group.WORLD is not None
    hosts = gloo_group(dist.group.WORLD)
    dist.all_reduce(torch.ones(1), group=hosts)
    if dist.get_rank():
        _break_connections(hosts)
    try:
        dist.all_reduce(torch.ones(1), group=hosts)
    except RuntimeError:
        return "broken"
    return "it answered"


def test_hosts_that_do_not_reach_each_other_are_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("connect [127.0.1.1]:33041: Connection refused")

    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 5])
    monkeypatch.setattr(dist, "new_group", fails)
    with pytest.raises(StagecutError, match=r"ranks 4, 5 do not reach each other: connect .* refused(.|\n)*GLOO_SOCKET_IFNAME"):
        gloo_group(None)  # type: ignore[arg-type]
