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


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""The names of the module inside a wrapper of torch's that computes the same."""


class _Then:
    """A module as it was, which is not kept alive. `kind` names its class."""

    def __init__(self, module: Any) -> None:
        self.module: weakref.ref[Any] = weakref.ref(module)
        self.kind = type(module).__name__
        self._class = weakref.ref(type(module))

    def without_wrappers(self, now: Any) -> Any:
        """The module itself where `now` is a wrapper of torch's around it, else `now`."""
        then = self.module()
        inner = now
        while inner is not None and inner is not then:
            inner = _wrapped(inner)
        return now if inner is None else inner

    def is_like(self, now: Any) -> bool:
        """True for the module itself and for one of the same class."""
        return now is self.module() or type(now) is self._class()


def _wrapped(module: Any) -> Any:
    """The module inside a wrapper of torch's; None for another module."""
    modules = vars(module).get("_modules") or {}
    names = [name for name in _WRAPPED if name in modules]
    return modules[names[0]] if names else None


@dataclass(frozen=True)
class _Bare:
    """A module without parameters or modules, or one that stages call."""

    then: _Then
    called: bool


@dataclass(frozen=True)
class _Holder:
    """The parameters of a module that stages hold, by name, those of its inner modules that tell by
    themselves, and those in which there is more to compare. `listed` are the modules of a list of modules.
    """

    path: str
    then: _Then
    parameters: _Tensors
    bare: _Modules
    facts: tuple[_Bare, ...]
    inner: tuple[tuple[str, _Holder], ...]
    listed: tuple[weakref.ref[Any], ...]


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
                facts.append(_Bare(_Then(child), called))
            elif child is not None:
                holder = self._holder(child, below)
                if holder.parameters or holder.bare or holder.inner:
                    inner.append((name, holder))
        return _Holder(
            path,
            _Then(module),
            tuple(parameters),
            tuple(bare),
            tuple(facts),
            tuple(inner),
            _listed(children),
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
            for outer, name, itself, length, parameters, bare in self._places:
                module = seen[outer]["_modules"][name]
                if module is not itself():
                    return False
                own = module.__dict__
                seen.append(own)
                if length and len(own["_modules"]) != length:
                    return False
                for key, address in parameters:
                    if id(own["_parameters"][key]) != address:
                        return False
                for key, then in bare:
                    if own["_modules"][key] is not then():
                        return False
        except (KeyError, AttributeError):  # the model has less than then
            return False
        return True


def _listed(children: dict[str, Any]) -> tuple[weakref.ref[Any], ...]:
    """The modules in a list of modules; none of another module's."""
    modules = [child for child in children.values() if child is not None]
    is_list = len(modules) == len(children) and all(map(str.isdigit, children))
    return tuple(map(weakref.ref, modules)) if is_list else ()


def _places(
    holder: _Holder, outer: int, name: str, count: list[int]
) -> Iterator[tuple[int, str, weakref.ref[Any], int, _Tensors, _Modules]]:
    """The holders in an order in which each comes after the one around it, whose place is `outer`."""
    count[0] += 1
    place = count[0]
    yield (
        outer,
        name,
        holder.then.module,
        len(holder.listed),
        holder.parameters,
        holder.bare,
    )
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
    if _is_shortened(holder, modules):
        return
    for (name, _), fact in zip(holder.bare, holder.facts, strict=True):
        child = modules.get(name)
        if child is not None and _differs(child, fact):
            raise _replaced(holder, f"'{name}', a {fact.then.kind},", child)
    for name, inside in holder.inner:
        child = modules.get(name)
        if child is None:
            continue
        child = inside.then.without_wrappers(child)
        if not inside.then.is_like(child):
            raise _replaced(holder, f"'{name}', a {inside.then.kind},", child)
        _refuse_replaced(inside, child, of_stages)


def _is_shortened(holder: _Holder, modules: dict[str, Any]) -> bool:
    """True for a list of which modules were taken out, so that those that are left have other numbers. Raises
    ChangedError for a list that has gained modules.
    """
    most = len(holder.listed)
    if most and len(modules) > most:
        raise _replaced(holder, f"'{[*modules][most]}', which was added,")
    if len(modules) >= most:
        return False
    known = {id(then()) for then in holder.listed}
    return all(id(module) in known for module in modules.values())


def _is_plain(own: dict[str, Any]) -> bool:
    """False for a module that makes its dicts of parameters and modules anew each time."""
    kinds = own.get("_parameters"), own.get("_modules")
    return all(isinstance(kind, dict) for kind in kinds)


def _differs(now: Any, fact: _Bare) -> bool:
    """True unless one module may stand for another: one of the same class, whose attributes decide, or the
    same one in a wrapper of torch's.
    """
    now = fact.then.without_wrappers(now)
    if fact.called:
        return now is not fact.then.module()
    return not fact.then.is_like(now)


def _replaced(holder: _Holder, what: str, now: Any = None) -> ChangedError:
    other = "another one than when it was cut"
    if now is not None:
        other = f"another one than when it was cut, of class {type(now).__name__}"
    return ChangedError(
        f"{what} of the model is {other}, and the stages go on with the one of then",
        where=f"module '{holder.path}', a {holder.then.kind}",
        hint="change it in place, as copy_ and load_state_dict without assign=True do; or cut the model as "
        "it is now by another pipeline(...): adapters and wrappers come before the cut; "
        "pipe.keep_as_cut() where it is meant",
    )
