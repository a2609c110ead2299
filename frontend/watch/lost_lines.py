"""Lines of a model that do something while it is traced which its stages do not do."""

from __future__ import annotations

from types import FrameType

from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from stagecut.frontend.source import is_pythons_file, is_users_file, shown, user_line


class LostLines:
    """`notes` has one for each line of the user's that was noted.

    Modules and functions that are kept whole do it in each call of the pipe, and are run without a trace.
    """

    def __init__(self, module: nn.Module) -> None:
        # by the module's dict: a tracer may put another object in front of a module
        self._paths: dict[int, str] = {
            id(vars(owner)): path for path, owner in module.named_modules()
        }
        self._notes: dict[tuple[str, int], str] = {}

    @property
    def notes(self) -> list[str]:
        """What is lost, where, and how it is kept."""
        return [*self._notes.values()]

    def note(self, frame: FrameType, lost: str, instead: str, kept: str) -> None:
        """The notes have the user's line at `frame`, if a trace goes through it. `lost` says what is lost,
        with `{forward}` for the code that does it, `instead` what to do instead, and `kept` what a module
        that is kept whole does.
        """
        line = user_line(frame)
        if line[:2] in self._notes or not is_users_file(line[0]):
            return
        if get_proxy_mode() is None:
            return
        path = self._path_of(frame)
        keep = f"leaf_modules=['{path}'] keeps that module whole, and it {kept}"
        if not path:
            keep = f"move this line into a submodule that leaf_modules=[...] keeps whole: it {kept}"
        forward = f"forward of module '{path}'" if path else "forward"
        self._notes[line[:2]] = (
            f"{lost.format(forward=forward)}: {shown(line)}\n  try: {instead}; or {keep}"
        )

    def _path_of(self, innermost: FrameType) -> str:
        """The path of the innermost module that a frame runs for."""
        frame: FrameType | None = innermost
        while frame is not None:
            owner = frame.f_locals.get("self")
            path = self._paths.get(id(getattr(owner, "__dict__", None)))
            if path is not None:
                return path
            frame = frame.f_back
        return ""


def behind_python(frame: FrameType) -> FrameType:
    """The innermost frame, from `frame` outwards, that is none of Python's own library."""
    while frame.f_back is not None and is_pythons_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame
