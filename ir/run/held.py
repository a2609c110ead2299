"""Parameters and modules of a model that its stages hold. A model that has others now is not the one that was
cut.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from stagecut.ir.run.remembered import ChangedError

_Modules = tuple[tuple[str, weakref.ref[Any]], ...]
_Tensors = tuple[tuple[str, int], ...]
"""By id, because torch swaps no tensor that has a weak reference, as `to` does with some. The stages hold the
tensor, so that no other has its id; where they hold it no more, one may, and goes unnoticed.
"""


@dataclass(frozen=True)
class _Bare:
    """A module without parameters or modules, or one that stages call."""

    kind: str
    called: bool


@dataclass(frozen=True)
class _Holder:
    """The parameters of a module that stages hold, by name, those of its inner modules that tell by
    themselves, and those in which there is more to compare. `length` of a list of modules, else 0.
    """

    path: str
    kind: str
    parameters: _Tensors
    bare: _Modules
    facts: tuple[_Bare, ...]
    inner: tuple[tuple[str, _Holder], ...]
    length: int


class Held:
    """What stages hold of a model, as it was when they were made. Nothing of the model is kept alive.

    parameters: the ids of those that the stages hold. called: the ids of the modules that they call, which
    have their tensors themselves. ran: the paths of the modules whose ops they have.
    """

    def __init__(
        self,
        model: Any,
        parameters: Collection[int],
        called: Collection[int],
        ran: Collection[str],
    ) -> None:
        self._parameters, self._called, self._ran = parameters, called, ran
        self._root = self._holder(model, "")
        del self._parameters, self._called, self._ran
        self._places = [*_places(self._root, 0, "", [0])]

    def _holder(self, module: Any, path: str) -> _Holder:
        own: dict[str, Any] = vars(module)
        parameters, bare, facts, inner = [], [], [], []
        children: dict[str, Any] = {}
        if _is_plain(own):
            children = own["_modules"]
            parameters = [
                (name, id(parameter))
                for name, parameter in own["_parameters"].items()
                if id(parameter) in self._parameters and not parameter.is_meta
            ]
        for name, child in children.items():
            below = f"{path}.{name}".lstrip(".")
            called = id(child) in self._called
            if child is not None and (called or self._is_bare(child, below)):
                bare.append((name, weakref.ref(child)))
                facts.append(_Bare(type(child).__name__, called))
            elif child is not None:
                holder = self._holder(child, below)
                if holder.parameters or holder.bare or holder.inner:
                    inner.append((name, holder))
        return _Holder(
            path,
            type(module).__name__,
            tuple(parameters),
            tuple(bare),
            tuple(facts),
            tuple(inner),
            len(children) if all(map(str.isdigit, children)) else 0,
        )

    def _is_bare(self, module: Any, path: str) -> bool:
        """True for a module whose ops the stages have, and which has nothing else that would tell."""
        own = vars(module)
        return path in self._ran and not own["_parameters"] and not own["_modules"]

    def refuse_replaced(self, model: Any, of_stages: Callable[[str], Any]) -> None:
        """Returns when the model has, under their names, the parameters and modules that the stages hold.
        What it has no more, or on the meta device, counts as the same: memory is freed so. `of_stages` gives
        the parameter that the stages have now under a name, None for none. Raises ChangedError otherwise.
        """
        if not self._is_the_same(model):
            _refuse_replaced(self._root, model, of_stages)

    def _is_the_same(self, model: Any) -> bool:
        # in one loop, because each call of a pipe asks
        seen: list[dict[str, Any]] = [{"_modules": {"": model}}]
        try:
            for outer, name, parameters, bare in self._places:
                own = seen[outer]["_modules"][name].__dict__
                seen.append(own)
                for key, address in parameters:
                    if id(own["_parameters"][key]) != address:
                        return False
                for key, then in bare:
                    if own["_modules"][key] is not then():
                        return False
        except (KeyError, AttributeError):  # the model has less than then
            return False
        return True


def _places(
    holder: _Holder, outer: int, name: str, count: list[int]
) -> Iterator[tuple[int, str, _Tensors, _Modules]]:
    """The holders in an order in which each comes after the one around it, whose place is `outer`."""
    count[0] += 1
    place = count[0]
    yield outer, name, holder.parameters, holder.bare
    for key, inside in holder.inner:
        yield from _places(inside, place, key, count)


def _refuse_replaced(
    holder: _Holder, module: Any, of_stages: Callable[[str], Any]
) -> None:
    own = vars(module)
    if not _is_plain(own):
        return
    parameters, modules = own["_parameters"], own["_modules"]
    for name, address in holder.parameters:
        now = parameters.get(name)
        if now is None or id(now) == address or now.is_meta:
            continue
        if now is not of_stages(f"{holder.path}.{name}".lstrip(".")):
            raise _replaced(holder, f"parameter '{name}'")
    if len(modules) < holder.length:  # what is left has other numbers
        return
    for (name, then), fact in zip(holder.bare, holder.facts, strict=True):
        child = modules.get(name)
        if child is not None and child is not then() and _differs(child, then(), fact):
            raise _replaced(holder, f"'{name}', a {fact.kind},")
    for name, inside in holder.inner:
        if modules.get(name) is not None:
            _refuse_replaced(inside, modules[name], of_stages)


def _is_plain(own: dict[str, Any]) -> bool:
    """False for a module that makes its dicts of parameters and modules anew each time."""
    kinds = own.get("_parameters"), own.get("_modules")
    return all(isinstance(kind, dict) for kind in kinds)


def _differs(now: Any, then: Any, fact: _Bare) -> bool:
    """True unless one module may stand for another: one of the same class, whose attributes decide, or the
    same one compiled.
    """
    modules = vars(now).get("_modules") or {}
    if then is not None and modules.get("_orig_mod") is then:
        return False
    return fact.called or type(now).__name__ != fact.kind


def _replaced(holder: _Holder, what: str) -> ChangedError:
    return ChangedError(
        f"{what} of the model is another one than when it was cut, and the stages go on with the one of then",
        where=f"module '{holder.path}', a {holder.kind}",
        hint="change it in place, as copy_ and load_state_dict without assign=True do; or cut the model as "
        "it is now by another pipeline(...); pipe.keep_as_cut() where it is meant",
    )
