"""The devices on which stages run, and how they run there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stagecut.backend.costs.ops import Device, device
from stagecut.backend.costs.runtime import Actions, actions
from stagecut.backend.schedules import (
    SCHEDULES,
    SINGLE,
    SPLITTING,
    Order,
    Orders,
    Step,
    V,
    flights_of,
    homes,
    refuse_orders,
)
from stagecut.backend.stages.backwards import refuse_backward
from stagecut.ir.errors import InputError, nearest
from stagecut.ir.keywords import near_names_in
from stagecut.ir.roles import Flight

STATE_OF = {"sgd": 0, "momentum": 1, "adamw": 2, "none": 0}
"""Optimizer -> how many tensors of the size of a parameter it keeps for each."""


def refuse_unknown(name: str, value: str, known: Iterable[str]) -> None:
    """Returns for a known value."""
    if value not in known:
        raise InputError(
            f"{name} '{value}' is not known", hint=nearest(str(value), known)
        )


@near_names_in
@dataclass(frozen=True)
class Setting:
    """The devices on which the stages will run, and how they run there.

    device: a Device or the name of one, such as "H100", for all ranks; or a list with one for each rank.
    schedule: its name, such as "1F1B". n_microbatches: how many micro-batches a step has.
    training: whether a step has a backward and an update; otherwise it is a forward.
    optimizer: "adamw", "momentum", "sgd" or "none", by which a rank's memory for optimizer state is counted.
    ranks: their number, where a rank has several stages.
    backward, compile, recompute, activation_budget, order: as for Driver.
    """

    device: Device | str | Sequence[Device | str] = "H100"
    schedule: str = "1F1B"
    n_microbatches: int = 8
    training: bool = True
    optimizer: str = "adamw"
    ranks: int | None = None
    backward: str = "autograd"
    compile: bool = False
    recompute: bool = False
    activation_budget: int | float | None = None
    order: Orders | None = field(default=None, repr=False)

    @property
    def by_graphs(self) -> bool:
        """True when graphs make the backward."""
        return self.training and self.backward == "graph"

    def refuse_backward(self) -> None:
        """Returns when Driver takes these options of the backward together. Raises InputError otherwise."""
        refuse_backward(
            self.backward, self.compile, self.recompute, self.activation_budget
        )

    def refuse_wrong(self) -> None:
        """Returns when all names are known, the numbers can be, and Driver takes these options of the
        backward together. Raises InputError otherwise.
        """
        self._refuse_schedule()
        refuse_unknown("optimizer", self.optimizer, STATE_OF)
        self.refuse_backward()
        for name in ("n_microbatches", "ranks"):
            number = getattr(self, name)
            if number is None and name == "ranks":
                continue
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{name}={number!r}", hint="a whole number from 1 on")
        if not self.every_device:
            raise InputError("no device is given", hint='device="H100"')

    def _refuse_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"there is no schedule '{self.schedule}'",
                hint=nearest(self.schedule, SCHEDULES),
            )

    def placement(self, stages: int) -> list[int]:
        """The rank of each of so many `stages`. Raises InputError for an unknown schedule, and where the
        stages do not fit the ranks.
        """
        self._refuse_schedule()
        if self.schedule in SINGLE:
            return homes(stages, stages, False)
        is_v = self.schedule in V
        ranks = self.ranks or max(1, stages // 2)
        has_two_each = is_v or self.ranks is None
        is_alone = stages == 1 and not is_v
        if stages % ranks or (has_two_each and stages != 2 * ranks and not is_alone):
            raise InputError(
                f"{self.schedule} cannot place {stages} stages on {ranks} ranks",
                hint=self._other_numbers(stages, is_v),
            )
        return homes(stages, ranks, is_v)

    def _other_numbers(self, stages: int, is_v: bool) -> str:
        """A hint for stages that do not fit the ranks."""
        if self.ranks is None:
            numbers = (stages + 1, 2 * stages) if stages > 1 else (4,)
            texts = [f"{number} ({number // 2} ranks)" for number in numbers]
            two_each = f"two stages a rank: cut into {' or '.join(texts)}"
            return f"{two_each}, or pass ranks=, a divisor of the stages"
        if is_v:
            return f"two stages a rank: cut into {2 * self.ranks}"
        return "pass ranks=, a divisor of the stages"

    @property
    def stages_at_once(self) -> int:
        """The number of stages is divisible by this."""
        if self.schedule in SINGLE:
            return 1
        return self.ranks or 2

    @property
    def every_device(self) -> list[Device]:
        """The devices as they are given: one for all ranks, or one for each."""
        if isinstance(self.device, str) or not isinstance(self.device, Sequence):
            return [device(self.device)]
        return [device(name) for name in self.device]

    def devices(self, stages: int) -> list[Device]:
        """The device of each of so many `stages`. Raises InputError when there are too few."""
        if isinstance(self.device, Device | str):
            return [device(self.device)] * stages
        placement = self.placement(stages)
        ranks = max(placement) + 1
        if ranks > len(self.device):
            raise InputError(
                f"{ranks} ranks, but {len(self.device)} devices",
                hint="give one for each rank",
            )
        return [device(self.device[home]) for home in placement]

    def actions(self, stages: int) -> Actions:
        """The actions of every rank in their order, for so many `stages`. Raises InputError when the stages
        do not fit the ranks, and StagecutError where the schedule has no order for these numbers.
        """
        return actions(*self._numbers(stages), self.training, self.order)

    def _numbers(self, stages: int) -> tuple[str, int, int, int]:
        """The schedule, the stages, the ranks and the micro-batches. Raises InputError when the stages do not
        fit the ranks, and when an order is for others.
        """
        homes = self.placement(stages)
        if self.order is not None:
            refuse_orders(self.order, self.schedule, tuple(homes), self.n_microbatches)
        return self.schedule, stages, max(homes) + 1, self.n_microbatches

    def orders(self, stages: int) -> Sequence[Order]:
        """The steps of every rank in their order, for so many `stages`. Raises as `actions`."""
        return [
            tuple(action for action in own if isinstance(action, Step))
            for own in self.actions(stages)
        ]

    @property
    def splits(self) -> bool:
        """True when the schedule splits backwards: gradients of inputs first, those of weights later."""
        return self.training and self.schedule in SPLITTING

    def flights(self, stages: int) -> list[Flight]:
        """The largest numbers of micro-batches of which each of so many `stages` holds values. Raises as
        `actions`.
        """
        if not self.training:
            return [Flight()] * stages
        return flights_of(*self._numbers(stages), self.order)

    def in_flight(self, stages: int) -> list[int]:
        """The largest number of micro-batches of which each of so many `stages` holds activations. Raises as
        `actions`.
        """
        return [flight.weights for flight in self.flights(stages)]
