"""Program -> pictures, in the DOT language and as SVG: the stages, the modules of a stage, or its ops."""

from __future__ import annotations

import graphviz

from stagecut.backend.pictures.blocks import block_graph
from stagecut.backend.pictures.drawing import BACKSLASH
from stagecut.backend.pictures.render import render
from stagecut.backend.pictures.stages import stage_graph
from stagecut.ir.errors import InputError, nearest
from stagecut.ir.graph import LINKED, Program
from stagecut.ir.keywords import near_names

LEVELS = ("stages", "modules", "ops")


@near_names
def to_dot(
    program: Program,
    *,
    level: str = "stages",
    stage: int | None = None,
    depth: int | None = None,
) -> str:
    """The picture of a program in the DOT language.

    level: 'stages' shows the values that cross between the stages of a linked program, 'modules' the module
    calls of one stage and the values between them, 'ops' every op. stage: which stage; None for the whole
    program. depth: how many levels of modules are opened; a deeper module is one box. Runs of modules of the
    same ops, shapes and wiring are drawn once, with their number.

    Names are those of the IR's text. Every part has an `id`: `stage-2`, `value-relu_3`, `module-layers.3`.
    All edges and nodes of a value have the class `value-relu_3`, and a module that stands for several has a
    class for each.

    Raises InputError for an unknown level or stage, and for stages of a program that is not linked.
    """
    return str(_graph(program, level, stage, depth).source)


@near_names
def to_svg(
    program: Program,
    *,
    level: str = "stages",
    stage: int | None = None,
    depth: int | None = None,
    renderer: str | None = None,
) -> str:
    """The picture that `to_dot` describes, as SVG. `program`, `level`, `stage` and `depth` are as for
    `to_dot`.

    renderer: the program that draws, 'dot' of Graphviz or 'graphviz-pure' of the extra stagecut[pictures];
    None for the first that is installed. The second writes the same bytes on every machine. Raises
    StagecutError where none is installed.
    """
    return render(_graph(program, level, stage, depth).source, renderer).replace(
        BACKSLASH, "\\"
    )


def _graph(
    program: Program, level: str, stage: int | None, depth: int | None
) -> graphviz.Digraph:
    if level not in LEVELS:
        raise InputError(f"there is no level '{level}'", hint=nearest(level, LEVELS))
    if level == "stages":
        return _stages(program, stage, depth)
    if stage is not None and not 0 <= stage < len(program.stages):
        raise InputError(
            f"there is no stage {stage}",
            hint=f"the program has {len(program.stages)} stages",
        )
    if depth is not None and depth < 0:
        raise InputError(
            f"depth={depth} opens no modules",
            hint="0 shows one box for each outermost module",
        )
    return block_graph(program, stage, depth, each_op=level == "ops")


def _stages(program: Program, stage: int | None, depth: int | None) -> graphviz.Digraph:
    if program.phase not in LINKED:
        raise InputError(
            f"the stage graph shows linked programs, this one is {program.phase}",
            hint="run all passes, or level='modules'",
        )
    if stage is not None or depth is not None:
        raise InputError(
            "stage= and depth= are for pictures of modules and ops",
            hint="level='modules'",
        )
    return stage_graph(program)
