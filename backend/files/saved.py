"""A pipe as files: `save` writes IR text, tensors and the calling convention of the model; `load` restores
the pipe.

A folder holds `program.ir`, `manifest.json` (alike on all ranks), and for each stage K `stage-K.safetensors`
and `stage-K.json`, so that each rank can save and load its own stages. There is no pickle, and no name in the
files leads to anything but itself: loading a stranger's files runs no code of theirs. (docs/SAVED.md)
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import nn

from stagecut.backend.files.manifest import (
    FORMAT,
    Manifest,
    Module,
    Side,
    Written,
    call_form,
    call_spec,
    read_json,
    write_json,
)
from stagecut.backend.files.tensors import (
    check_storable,
    read_tensors,
    write_tensors,
)
from stagecut.backend.files.untrusted import (
    SavedError,
    check_tensors,
    digest_of,
    read_text,
)
from stagecut.backend.stages.emit import emit
from stagecut.backend.stages.modules import Stage, StageModule, stored
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import entries, held_tensors, lost_hint, refuse_meta
from stagecut.ir.aliases import storage_root
from stagecut.ir.check.verifier import verify
from stagecut.ir.graph import Op, Program, StateEntry, Value, leaves, nested_ops
from stagecut.ir.keywords import near_names
from stagecut.ir.ops import facts
from stagecut.ir.run.bindings import Bindings, ModuleFacts
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import fingerprint, text
from stagecut.ir.types import DTYPES, TensorType
from stagecut.ir.version import VERSION

KNOWN_OPS = frozenset("aten prims higher_order quantized torchvision".split())
"""Namespaces of registered operators that `load` allows by itself."""
_MODES = {"train": True, "eval": False}

LONGEST = 1000
"""So many bytes of what a module prints of itself are kept."""


# --- writing ------------------------------------------------------------------------------------------


def save(pipe: Staged, folder: str | Path, stages: Iterable[int] | None = None) -> None:
    """As `Pipe.save`."""
    folder = _folder(folder)
    if folder.name in ("", ".."):
        raise SavedError(
            f"a save makes a folder of its own, '{folder}' is none",
            hint='pipe.save("run/pipe")',
        )
    pipe.refuse_changed_model()
    chosen = [pipe.stages[index] for index in _chosen(stages, pipe.num_stages)]
    _refuse_whole(pipe.program)
    state = {stage.index: _state(pipe, stage) for stage in chosen}
    tensors: dict[StateEntry, torch.Tensor] = {}
    for of_stage in state.values():
        tensors |= of_stage
    _refuse_restrided(pipe.program, tensors)
    _refuse_overlaps(pipe.program, tensors)
    mark = fingerprint(pipe.program)
    with _writing(folder) as aside:
        _write_program(pipe, mark, aside)
        for stage in chosen:
            _write_stage(stage, mark, state[stage.index], aside)
        if not _moved(aside, folder):
            indices = None if stages is None else [stage.index for stage in chosen]
            _join(mark, aside, folder, indices)


def _folder(folder: str | Path) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise SavedError(
            f"{folder!r} is no folder", hint='a str or a Path, such as "run/pipe"'
        ) from None


def _chosen(stages: Iterable[int] | None, count: int) -> list[int]:
    """The requested ones of `count` stages, in order. Raises SavedError for a number of no stage."""
    if stages is None:
        return [*range(count)]
    if isinstance(stages, str) or not isinstance(stages, Iterable):
        raise SavedError(
            f"stages={stages!r} is no list of stages",
            hint="stages=[0, 1], or leave it out for all",
        )
    return sorted({_stage(index, count) for index in stages})


def _stage(index: int, count: int) -> int:
    """`index`, when that is one of `count` stages. Raises SavedError otherwise."""
    if not isinstance(index, int):
        raise SavedError(
            f"{index!r} is no stage", hint="stages are numbers, the first one is 0"
        )
    if not 0 <= index < count:
        raise SavedError(
            f"there is no stage {index}, there are {count}", hint=f"0 to {count - 1}"
        )
    return index


def _refuse_whole(program: Program) -> None:
    """Raises SavedError naming what the program calls that exists in this process only."""
    whole = dict.fromkeys(
        op.target for op in nested_ops(program.all_ops()) if op.is_users
    )
    if whole:
        paths = [target.partition(".")[2] for target in whole]
        names = ", ".join(f"'{path}'" for path in paths)
        raise SavedError(
            f"the pipe calls code of yours that a file cannot hold: {names}",
            where="modules kept whole and functions of yours",
            hint=(
                "make it traceable, without leaf_modules=; or save its state: pipe.state_dict(), "
                "stagecut.backend.files.checkpoint"
            ),
        )


def _state(pipe: Staged, stage: Stage) -> dict[StateEntry, torch.Tensor]:
    """The tensors a stage holds. Raises SavedError for one that cannot be written or would be lost."""
    refuse_meta(pipe.program, stage)
    traced: set[str] = set()
    for names in pipe.program.stages[stage.index].state.values():
        traced.update(map(stored, names))
    for name in stage.state_dict():
        if name not in traced:
            raise SavedError(
                f"'{name}' is no tensor of the traced model, it would be lost",
                hint=lost_hint(name, "save before the stages are wrapped"),
            )
    return {
        entry: _held(pipe, stage, entry)
        for entry in entries(pipe.program, [stage.index])
    }


def _held(pipe: Staged, stage: Stage, entry: StateEntry) -> torch.Tensor:
    first, *others = held_tensors(pipe.program, [stage], entry)
    if others:
        raise SavedError(
            f"the names of '{entry.name}' are different tensors now",
            where=f"stage {stage.index}",
            hint="tie them again",
        )
    check_storable(entry, first)
    return first


def _refuse_overlaps(
    program: Program, state: Mapping[StateEntry, torch.Tensor]
) -> None:
    """Raises SavedError for overlapping tensors, because two tensors in one place would become two: a change
    of one would not change the other.
    """
    written = {value for op in program.all_ops() for value in op.versions}
    # storage -> the end of the memory that was passed there, and the tensor that ends there
    farthest: dict[int, tuple[int, StateEntry]] = {}
    for entry in sorted(state, key=lambda entry: _extent(state[entry])):
        start, end = _extent(state[entry])
        reached, other = farthest.get(entry.storage, (0, entry))
        changes = _changes(entry, written) or _changes(other, written)
        if start < reached and changes:
            raise SavedError(
                f"'{other.name}' and '{entry.name}' lie in the same memory",
                hint="make one from the other in forward, not in __init__",
            )
        if end >= reached:
            farthest[entry.storage] = (end, entry)


def _changes(entry: StateEntry, written: Collection[Value]) -> bool:
    return entry.kind == "param" or entry.value in written


def _refuse_restrided(
    program: Program, state: Mapping[StateEntry, torch.Tensor]
) -> None:
    """Raises SavedError where as_strided may read the memory around a tensor, which is not saved with it."""
    for op in nested_ops(program.all_ops()):
        entry = storage_root(op.operands[0]).owner if facts(op).reads_around else None
        if (
            isinstance(entry, StateEntry)
            and entry in state
            and state[entry].untyped_storage().nbytes() != state[entry].nbytes
        ):
            raise SavedError(
                f"'{entry.name}' is a part of a larger tensor, and as_strided may read the rest of it",
                where=op.where(),
                hint="make it .clone() in __init__",
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The memory of a dense tensor."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _write_program(pipe: Staged, mark: str, folder: Path) -> None:
    (folder / "program.ir").write_text(
        text(pipe.program), encoding="utf-8", newline="\n"
    )
    modules: dict[str, Module] = {}
    for stage in pipe.stages:
        modules |= {module._path: _module_form(module) for module in _own(stage)}
    manifest = Manifest(
        FORMAT,
        VERSION,
        str(torch.__version__),
        Written(digest_of(folder / "program.ir"), mark, pipe.num_stages),
        list(pipe._names),
        pipe.training,
        modules,
        dict(pipe._sizes),
        list(pipe.notes),
        None if pipe._call_spec is None else call_form(pipe._call_spec),
    )
    write_json(folder / "manifest.json", manifest)


def _own(stage: Stage) -> Iterator[StageModule]:
    return (module for module in stage.modules() if isinstance(module, StageModule))


def _module_form(module: StageModule) -> Module:
    module_facts = module._facts
    switches: dict[str, dict[str, bool]] = {}
    for mode, flag in _MODES.items():
        if flag in module_facts.switches:
            switches[mode] = dict(module_facts.switches[flag])
    # a text that JSON cannot hold is no reason not to save
    described = module_facts.described.encode(errors="replace")
    return Module(
        module._title,
        module_facts.training,
        module_facts.branch,
        switches,
        described[:LONGEST].decode(errors="ignore"),
    )


def _write_stage(
    stage: Stage, mark: str, state: Mapping[StateEntry, torch.Tensor], folder: Path
) -> None:
    file = folder / f"stage-{stage.index}.safetensors"
    described = write_tensors(file, state)
    training = {module._path: module.training for module in _own(stage)}
    side = Side(FORMAT, mark, stage.index, digest_of(file), training, described)
    write_json(folder / f"stage-{stage.index}.json", side)


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, removed afterwards. Raises SavedError when something cannot be
    written.
    """
    aside = folder.with_name(f".{folder.name}.{uuid4().hex[:12]}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
    except OSError as error:
        raise SavedError(
            f"'{folder}' cannot be written: {error.strerror or error}",
            hint="choose another folder",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _moved(aside: Path, folder: Path) -> bool:
    """True when the folder written aside is now `folder`; False when that holds something already."""
    try:
        os.rename(aside, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _join(mark: str, aside: Path, folder: Path, stages: list[int] | None) -> None:
    """The stages written aside stand beside those that other ranks have saved of the same program."""
    hint = "give every save a folder of its own, such as run/step-100"
    if stages is None:
        raise SavedError(f"'{folder}' is there already", hint=hint)
    for index in stages:
        if os.path.lexists(folder / f"stage-{index}.json"):
            raise SavedError(f"stage {index} is in '{folder}' already", hint=hint)
    if _manifest(folder).program.fingerprint != mark:
        raise SavedError(
            f"'{folder}' holds another program",
            hint="build the same model with the same cuts on every rank",
        )
    for index in stages:
        # the JSON file comes last: it says that the stage is whole
        for name in (f"stage-{index}.safetensors", f"stage-{index}.json"):
            os.replace(aside / name, folder / name)


# --- reading ------------------------------------------------------------------------------------------


Restored = TypeVar("Restored", bound=Staged)


def restored(
    pipe_class: type[Restored],
    folder: str | Path,
    stages: Iterable[int] | None,
    device: torch.device | str,
    ops: Collection[str],
) -> Restored:
    """The pipe that was saved in `folder`, as `stagecut.load` says, as an instance of that class."""
    saved = _Saved(_folder(folder), device, ops)
    sides = {index: saved.side(index) for index in _chosen(stages, saved.count)}
    tensors: dict[StateEntry, torch.Tensor] = {}
    for index, side in sides.items():
        for entry, tensor in saved.state(index, side).items():
            _agree(entry, tensors.setdefault(entry, tensor), tensor)
    bound: dict[StateEntry, torch.Tensor] = {}
    for entry in saved.program.state:
        if entry.stages:
            bound[entry] = tensors[entry] if entry in tensors else _absent(entry)
    saved.bind(bound)
    saved.program.output_names = ()
    if saved.bindings.call:
        saved.program.output_names = saved.bindings.call.output_names()
    pipe = pipe_class(saved.program, saved.bindings)
    for index, side in sides.items():
        _set_modes(pipe.stages[index], side)
    pipe.training = saved.manifest.training
    pipe._sizes = dict(saved.manifest.sizes)
    return pipe


@near_names
def load_stage(
    folder: str | Path,
    index: int,
    *,
    device: torch.device | str = "cpu",
    ops: Collection[str] = (),
) -> Stage:
    """Stage `index` of the pipe that was saved in `folder`, as a module on `device`. Only its own tensors are
    read. `ops` are namespaces of operators of yours, as for `load`.

    Raises SavedError as `load` does, and for an index that the pipe has not.
    """
    saved = _Saved(_folder(folder), device, ops)
    side = saved.side(_stage(index, saved.count))
    saved.bind(saved.state(index, side))
    (stage,) = emit(saved.program, saved.bindings, [index])
    _set_modes(stage, side)
    return stage


class _Saved:
    """A folder whose program has been read and checked."""

    def __init__(
        self, folder: Path, device: torch.device | str, ops: Collection[str]
    ) -> None:
        self.folder = folder
        self.device = _device(device)
        self.manifest = _manifest(folder)
        written = self.manifest.program
        self.program = parse(
            read_text(folder / "program.ir", written.sha256), "program.ir"
        )
        verify(self.program)
        self.count = len(self.program.stages)
        _check_program(self.program, KNOWN_OPS | frozenset(ops))
        if (
            fingerprint(self.program) != written.fingerprint
            or written.stages != self.count
        ):
            raise SavedError(
                "program.ir is not the program of manifest.json",
                where=str(folder),
                hint="save again",
            )
        self.bindings = self._bindings()

    def _bindings(self) -> Bindings:
        modules = self.manifest.modules
        call = self.manifest.call
        bindings = Bindings(device=self.device, notes=list(self.manifest.notes))
        for path, module in modules.items():
            switches = _switches(module.switches)
            bindings.facts[path] = ModuleFacts(
                module.title,
                module.captured,
                module.branch,
                switches,
                described=module.described,
            )
        if call is not None:
            inputs = len(self.program.inputs)
            outputs = len(self.program.outputs)
            bindings.call = call_spec(call, inputs, outputs)
        return bindings

    def side(self, index: int) -> Side:
        """The facts written beside the tensors of a stage."""
        path = self.folder / f"stage-{index}.json"
        if not os.path.lexists(path):
            raise SavedError(
                f"stage {index} is not there: no '{path.name}'",
                where=str(self.folder),
                hint="save it where it is: stages=[...]",
            )
        side = read_json(path, Side)
        mark = self.manifest.program.fingerprint
        if side.fingerprint != mark or side.stage != index:
            raise SavedError(
                f"'{path.name}' is of another program or another stage",
                where=str(self.folder),
                hint="save all stages again",
            )
        return side

    def state(self, index: int, side: Side) -> dict[StateEntry, torch.Tensor]:
        """The tensors of a stage, checked and read."""
        path = self.folder / f"stage-{index}.safetensors"
        check_tensors(path, side.sha256)
        wanted = entries(self.program, [index])
        return read_tensors(path, wanted, side.tensors, self.device)

    def bind(self, tensors: Mapping[StateEntry, torch.Tensor]) -> None:
        """Every name of the state stands for its tensor, in the order of the model."""
        owners = self.program.name_owners()
        names = self.manifest.names
        if len(set(names)) != len(names) or set(names) != set(owners):
            raise SavedError(
                "manifest.json does not list the state of the program",
                where=str(self.folder),
                hint="save again",
            )
        self.bindings.tensors = {
            name: tensors[owners[name]] for name in names if owners[name] in tensors
        }


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SavedError(
            f"there is no device {device!r}: {str(error).splitlines()[0]}",
            hint='device="cpu"',
        ) from None


def _manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        raise SavedError(
            f"there is no saved pipe in '{folder}'",
            hint="pipe.save(folder) makes one; stagecut.checkpoint.load reads checkpoints",
        )
    return read_json(path, Manifest)


def _switches(modes: Mapping[str, dict[str, bool]]) -> dict[bool, dict[str, bool]]:
    if not modes.keys() <= _MODES.keys():
        raise SavedError(
            "a module switches in train and eval only", hint="the manifest is damaged"
        )
    return {_MODES[mode]: flags for mode, flags in modes.items()}


def _check_program(program: Program, namespaces: Collection[str]) -> None:
    """Returns when the program can be loaded: linked, with sized state, flat outputs and known operators."""
    if program.phase != "linked":
        raise SavedError(
            f"program.ir is {program.phase}, not linked", hint="save a pipe"
        )
    for entry in program.state:
        if not isinstance(entry.type, TensorType) or any(
            isinstance(dim, str) for dim in entry.type.shape
        ):
            raise SavedError(
                f"'{entry.name}' is no tensor of known size", where="program.ir"
            )
    if any(
        not isinstance(leaf, Value) and any(True for _ in leaves(leaf))
        for leaf in program.outputs
    ):
        raise SavedError("the outputs are not flat", where="program.ir")
    _refuse_whole(program)
    for op in nested_ops(program.all_ops()):
        _check_namespace(op, namespaces)


def _check_namespace(op: Op, namespaces: Collection[str]) -> None:
    match = re.match(r"torch\.ops\.(\w+)", op.target)
    if match and match[1] not in namespaces:
        raise SavedError(
            f"the program calls '{op.target}', an operator of a library",
            where=op.where(),
            hint=f'load(..., ops=["{match[1]}"]) allows it',
        )


def _agree(entry: StateEntry, first: torch.Tensor, second: torch.Tensor) -> None:
    """Returns when two stages have saved the same bits for a tensor that they share. On meta there are no
    bits to compare.
    """
    if (
        first is not second
        and not first.is_meta
        and not torch.equal(_bits(first), _bits(second))
    ):
        raise SavedError(
            f"the stages hold different values for '{entry.name}'",
            hint="save all stages after the same step",
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _absent(entry: StateEntry) -> torch.Tensor:
    """A tensor on meta, for a stage that is not read."""
    assert isinstance(entry.type, TensorType)
    try:
        shape: Any = entry.type.shape
        dtype = getattr(torch, DTYPES[entry.type.dtype])
        tensor = torch.empty(shape, dtype=dtype, device="meta")
    except (RuntimeError, OverflowError, TypeError):
        raise SavedError(
            f"'{entry.name}' cannot have the size {entry.type}", where="program.ir"
        ) from None
    if entry.kind == "param":
        return nn.Parameter(tensor, requires_grad=entry.requires_grad)
    return tensor


def _set_modes(stage: Stage, side: Side) -> None:
    for module in _own(stage):
        module.training = side.training.get(module._path, module.training)
