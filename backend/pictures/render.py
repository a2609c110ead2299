"""DOT -> SVG by one of two programs: `dot` of Graphviz, or `graphviz-pure`, which pip installs."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig

from stagecut.ir.errors import InputError, StagecutError, nearest

PURE = "graphviz-pure"
"""The program of the package of this name: one version of it writes the same bytes on every machine."""
RENDERERS = ("dot", PURE)
"""Programs that draw, in the order in which they are tried."""


def find_renderer(names: tuple[str, ...] = RENDERERS) -> str | None:
    """The path of the first of these programs that is installed."""
    return next(filter(None, map(_path, names)), None)


def render(source: str, renderer: str | None = None) -> str:
    """The SVG of a picture in the DOT language, drawn by this one of RENDERERS, else by the first that is
    installed.

    Raises StagecutError where none is installed and where drawing fails, InputError for one that is not
    known.
    """
    if renderer is not None and renderer not in RENDERERS:
        raise InputError(
            f"there is no renderer '{renderer}'", hint=nearest(renderer, RENDERERS)
        )
    names = RENDERERS if renderer is None else (renderer,)
    program = find_renderer(names)
    if program is None:
        raise _missing(names)
    return _run(program, source)


def _path(name: str) -> str | None:
    """The program of this name beside Python, where pip puts it even when the PATH does not lead there, or on
    the PATH.
    """
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _missing(names: tuple[str, ...]) -> StagecutError:
    programs = " and ".join(f"`{name}`" for name in names)
    return StagecutError(
        f"no program that draws pictures is installed: looked for {programs}, beside Python and on the PATH",
        hint=(
            'pip install "stagecut[pictures]"; or Graphviz: apt-get install graphviz, '
            "brew install graphviz; to_dot needs no program"
        ),
    )


def _run(program: str, source: str) -> str:
    try:
        done = subprocess.run(
            [program, "-Kdot", "-Tsvg"],
            input=source.encode(),
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = ""
        if isinstance(error, subprocess.CalledProcessError):
            said = error.stderr.decode(errors="replace").strip()
        raise StagecutError(
            f"a picture could not be drawn: {error} {said}".rstrip(),
            hint=f"install it anew: {program}",
        ) from error
    return done.stdout.decode()
