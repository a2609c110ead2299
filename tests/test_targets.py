"""Op names resolve to callables of an allowed list, and to nothing else."""

import operator

import pytest
import torch

from stagecut.ir.errors import EmitError
from stagecut.ir.run.targets import check_op, name_of, resolve
from stagecut.ir.text.parser import parse


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.ops.aten.add.Tensor, "aten.add.Tensor"),
        (torch.ops.quantized.add.default, "torch.ops.quantized.add.default"),
        (torch.relu, "torch.relu"),
        (torch.nn.functional.gelu, "torch.nn.functional.gelu"),
        (torch.linalg.norm, "torch.linalg.norm"),
        (torch.nn.functional.dropout, "torch.nn.functional.dropout"),
        (operator.getitem, "operator.getitem"),
        (torch.ops.higher_order.cond, "torch.ops.higher_order.cond"),
        (getattr, "builtins.getattr"),
    ],
)
def test_name_and_back(function: object, name: str) -> None:
    assert name_of(function) == name  # type: ignore[arg-type]
    assert resolve(name) is function


@pytest.mark.parametrize(
    "line",
    [
        'method.__reduce__(%x)', 'method.tofile(%x, "/tmp/x")', 'method.system(%x, "ls")', 'builtins.getattr(%x, "__class__")',
        'builtins.getattr(%x, "_backward_hooks")',
    ],
)  # fmt: skip
def test_methods_and_attributes_are_those_of_tensors(line: str) -> None:
    program = parse(f"program @P phase=traced {{\n  input %x : f32[2]\n  %y = {line} : object\n  output (%y,)\n}}\n")
    with pytest.raises(EmitError):
        check_op(program.ops[0])


def test_a_users_function_has_no_name() -> None:
    assert name_of(lambda x: x) is None


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "builtins.eval", "builtins.exec", "builtins.__import__", "torch.load", "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.serialization.os.system",
        "torch.os.system", "operator.attrgetter.__class__", "aten.no_such_op.default", "torch.__builtins__",
        "torch.sys.exit", "math.__loader__.load_module", "torch.ops.load_library", "torch.nn.Linear", "torch.inspect.os.system",
        "torch.builtins.eval", "torch.importlib.import_module", "torch.functional.os.system", "operator.methodcaller",
    ],
)  # fmt: skip
def test_nothing_else_is_reachable(name: str) -> None:
    with pytest.raises(EmitError):
        resolve(name)
