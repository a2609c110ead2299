"""What hosts tell each other besides the tensors of a step. No device is waited for: it goes on with what
it was given before.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist

from stagecut.ir.errors import InputError, StagecutError

_hosts: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def group_of_hosts(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A group of the same ranks for tensors of the CPU and for objects: `group` itself where it has gloo, and
    where gloo is not to be had.

    Every rank of `group` calls it, and no other process has to. There is one for each group.
    """
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    if "gloo" in str(dist.get_backend_config(group)) or not dist.is_gloo_available():
        return group
    if group not in _hosts:
        _hosts[group] = gloo_group(group)
    return _hosts[group]


def refuse_destroyed(group: dist.ProcessGroup | None) -> None:
    """Returns while the group is there. Raises InputError after `destroy_process_group`."""
    try:
        dist.get_rank(group)
    except ValueError:
        raise InputError(
            "the process group of these ranks was destroyed",
            hint="dist.destroy_process_group() after the last call; for a new group, a new Driver",
        ) from None


def gloo_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A new group of the same ranks. Every rank of `group` calls it, and no other process has to.

    Raises StagecutError where the hosts do not reach each other.
    """
    ranks = dist.get_process_group_ranks(group)
    hosts: dist.ProcessGroup
    try:
        hosts = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    except RuntimeError as error:
        raise StagecutError(
            f"the hosts of ranks {', '.join(map(str, ranks))} do not reach each other: {error}",
            where="a group of gloo beside that of the devices, for small messages",
            hint="GLOO_SOCKET_IFNAME=<the network interface that connects them>",
        ) from error
    return hosts
