"""The cheapest cut of a network within a limit of bytes. Each edge has bytes and a cost, and a cut has those
of the edges that leave its side of the start.

A minimum cut of `bytes * p + cost * q` is a corner of the lower hull of all cuts, and the chord between two
cuts that are known says for which p and q to ask next. So a few minimum cuts find the two neighbours between
which the limit lies. Where these differ in parts of the network that do not touch, as the equal blocks of a
model do, each part may be taken from either: all such cuts are on the hull. Numbers are whole, and exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx

START, END = "start", "end"

Edge = tuple[Hashable, Hashable]


@dataclass(frozen=True)
class Cut:
    """The nodes on the side of the end; the bytes and the cost of the edges that lead there."""

    behind: frozenset[Hashable]
    nbytes: int
    cost: int


@dataclass
class Network:
    """Nodes between START and END."""

    edges: dict[Edge, tuple[int, int] | None] = field(default_factory=dict)
    """Edge -> its bytes and its cost; None for one that no cut divides."""

    def price(
        self, source: Hashable, target: Hashable, nbytes: int, cost: int = 0
    ) -> None:
        """A cut between these two has these bytes and this cost."""
        self.edges[source, target] = nbytes, cost

    def follow(self, source: Hashable, target: Hashable) -> None:
        """Where `source` is on the side of the start, `target` is."""
        self.edges[source, target] = None

    def least(self) -> Cut:
        """The cut with the fewest bytes; of these, the cheapest."""
        _, cost = self._totals()
        return self._minimum(1 + cost, 1)

    def cheapest(self) -> Cut:
        """The cut with the lowest cost; of these, the one with the fewest bytes."""
        nbytes, _ = self._totals()
        return self._minimum(1, 1 + nbytes)

    def within(self, limit: int, least: Cut, cheapest: Cut) -> Cut:
        """A cut with at most `limit` bytes, which `least` has, and as little cost as that allows. One for a
        higher limit costs no more.
        """
        low, high = least, cheapest
        if high.nbytes <= limit:
            return high
        while True:
            by_bytes = low.cost - high.cost
            by_cost = high.nbytes - low.nbytes
            between = self._minimum(by_bytes, by_cost)
            value = between.nbytes * by_bytes + between.cost * by_cost
            if value == low.nbytes * by_bytes + low.cost * by_cost:
                return self._mixed(low, high, limit)
            if between.nbytes <= limit:
                low = between
            else:
                high = between

    def cost_that_outweighs(self) -> int:
        """A cost that no saving of the bytes and costs so far is worth."""
        nbytes, cost = self._totals()
        return (1 + nbytes) * (1 + cost)

    def _totals(self) -> tuple[int, int]:
        priced = [price for price in self.edges.values() if price is not None]
        return sum(price[0] for price in priced), sum(price[1] for price in priced)

    def _minimum(self, by_bytes: int, by_cost: int) -> Cut:
        graph: Any = networkx.DiGraph()
        graph.add_nodes_from((START, END))
        for edge, price in self.edges.items():
            if price is None:
                graph.add_edge(*edge)
                continue
            nbytes, cost = price
            graph.add_edge(*edge, capacity=nbytes * by_bytes + cost * by_cost)
        _, (_, behind) = networkx.minimum_cut(graph, START, END)
        return self._cut(frozenset(behind))

    def _cut(self, behind: frozenset[Hashable]) -> Cut:
        nbytes, cost = 0, 0
        for (source, target), price in self.edges.items():
            if price is not None and source not in behind and target in behind:
                nbytes += price[0]
                cost += price[1]
        return Cut(behind, nbytes, cost)

    def _mixed(self, low: Cut, high: Cut, limit: int) -> Cut:
        """`low` in some parts and `high` in the others: as many parts as fit, in the order of the edges."""
        mixed = low
        for part in self._parts(low.behind ^ high.behind):
            further = self._cut(mixed.behind ^ part)
            if further.nbytes > limit:
                break
            mixed = further
        return mixed

    def _parts(self, nodes: frozenset[Hashable]) -> Iterator[frozenset[Hashable]]:
        """These nodes in parts, between which there is no edge."""
        graph: Any = networkx.Graph()
        for source, target in self.edges:
            graph.add_nodes_from(nodes & {source, target})
            if source in nodes and target in nodes:
                graph.add_edge(source, target)
        for part in networkx.connected_components(graph):
            yield frozenset(part)
