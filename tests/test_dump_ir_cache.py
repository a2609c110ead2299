"""dump-ir answers from its cache only while the model would be traced alike."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from fresh import Fresh

from stagecut.backend.cache import cache_folder
from stagecut.tools.dump_ir import cache, evidence
from stagecut.tools.dump_ir.main import parser
from stagecut.tools.dump_ir.options import named

ROOT = Path(__file__).parent.parent

MODEL = """
import json, os
from importlib import import_module
from pathlib import Path
import torch
import helper
from packed import inner
import vendor
def there(name):
    try:
        import_module(name)
    except ImportError:
        return 0
    return 1

HERE = Path(__file__).parent

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = json.loads((HERE / "config.json").read_text())["steps"]
        self.steps += len(os.listdir(HERE / "data")) + (HERE / "more").exists() + int(os.environ.get("STEPS", 0))
        self.steps += helper.STEPS + inner.STEPS + vendor.STEPS + there('extra') + there('packed.extra')
        self.steps += int(os.environ.get('MKL_NUM_THREADS', 0))
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(self.steps):
            x = x + 1
        return self.second(self.first(x))

def make():
    return Model(), (torch.ones(2, 4),), {}
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    """Runs in new processes."""
    with Fresh() as runs:
        yield runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that reads all that a model can read, and an empty cache."""
    project, installed = tmp_path / "project", tmp_path / "site-packages"
    for place in (project / "packed", project / "data", installed / "vendor"):
        place.mkdir(parents=True)
    (project / "model.py").write_text(MODEL)
    (project / "config.json").write_text('{"steps": 1}')
    (project / "data" / "one").touch()
    for path in (project / "helper.py", project / "packed" / "inner.py", installed / "vendor" / "__init__.py"):
        path.write_text("STEPS = 1\n")
    monkeypatch.setenv("STAGECUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(project)
    return project


Ask = Callable[..., tuple[bool, str]]


@pytest.fixture
def ask(folder: Path, fresh: Fresh) -> Ask:
    """One run of dump-ir that works: whether the model was traced, and what was printed."""

    def run(*options: str, source: str = "model.py:make", before: str = "") -> tuple[bool, str]:
        shown = fresh.run(source, *options, path=str(folder.parent / "site-packages"), before=before)
        assert shown.status == 0, shown.text
        return shown.traced, shown.text

    return run


def entry(folder: Path, kind: str = "traces") -> Path:
    (path,) = (folder.parent / "cache" / kind).iterdir()
    return path


def test_the_second_run_traces_nothing(folder: Path, ask: Ask) -> None:
    first, second = ask(), ask()
    assert (first[0], second[0]) == (True, False)
    assert first[1] == second[1]
    assert first[1].count("aten.add.Tensor") == 5


# --- every part of the key ----------------------------------------------------------------------------


Change = Callable[[Path, pytest.MonkeyPatch], None]


def write(name: str, content: str) -> Change:
    def change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    return change


def same_size_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.stat(folder / "helper.py")
    (folder / "helper.py").write_text("STEPS = 2\n")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    os.utime(folder / "helper.py", ns=(status.st_atime_ns, status.st_mtime_ns))


def variable(name: str) -> Change:
    return lambda folder, monkeypatch: monkeypatch.setenv(name, "1")


OTHER = "there are other modules to import: "
CHANGES = {
    "the model's file": (write("model.py", MODEL.replace("x + 1", "x - 1")), "model.py has changed"),
    "a module": (write("helper.py", "STEPS = 2  # now\n"), "helper.py has changed"),
    "a module of a package": (write("packed/inner.py", "STEPS = 2  # now\n"), "packed/inner.py has changed"),
    "a module, as large and as old as before": (same_size_and_time, "helper.py has changed"),
    "an installed package": (
        write("../site-packages/vendor/__init__.py", "STEPS = 2  # now\n"),
        "vendor/__init__.py (installed) has changed",
    ),
    "a package that was missing": (write("../site-packages/extra/__init__.py", ""), OTHER),
    "a module that was missing": (write("extra.py", ""), OTHER + "extra.py"),
    "a folder that was missing": (write("extra/read.me", ""), OTHER + "extra"),
    "a module of a package that was missing": (write("packed/extra.py", ""), OTHER + "packed/extra.py"),
    "a module that is found before another": (write("vendor.py", "STEPS = 2\n"), OTHER + "vendor.py"),
    "a package that is found before a module": (write("helper/__init__.py", "STEPS = 2\n"), OTHER + "helper"),
    "a file that is read": (write("config.json", '{"steps": 2}'), "config.json has changed"),
    "a file that is asked for": (write("more", ""), "more is new"),
    "a file in a folder that is listed": (write("data/two", ""), "the folder data holds other files"),
    "a variable": (variable("STEPS"), "other variables of the environment: STEPS"),
    "a number of threads": (variable("MKL_NUM_THREADS"), "other variables of the environment: MKL_NUM_THREADS"),
}


@pytest.mark.parametrize(("change", "why"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(change: Change, why: str, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = ask()
    change(folder, monkeypatch)
    traced, again = ask()
    assert traced
    reason, _, after = again.partition("\n")
    assert reason.startswith(f"dump-ir: note: traced again: {why}")
    assert after != before
    assert ask() == (False, after)
    assert ask("--no-cache") == (True, after)


IN_CACHE = "from stagecut.tools.dump_ir import cache; cache."
PLACES = {
    "the version of Python": ("import sys; sys.version = '3.99'", "another Python"),
    "the interpreter": ("import sys; sys.executable = '/opt/python'", "another Python"),
    "the version of stagecut": (f"{IN_CACHE}VERSION = '9.9'", "another version of stagecut"),
    "where stagecut is": (f"{IN_CACHE}__file__ = '/opt/cache.py'", "another version of stagecut"),
    "the machine": (f"{IN_CACHE}platform.node = lambda: 'another'", "another machine"),
    "where imports look": ("import sys; sys.path.insert(0, '/opt')", "another list of folders for imports"),
    "the working directory": ("import os; os.chdir('/')", ""),
    "the format": (f"{IN_CACHE}FORMAT += 1", ""),
}


@pytest.mark.parametrize(("before", "why"), PLACES.values(), ids=PLACES.keys())
def test_another_place_is_noticed(before: str, why: str, folder: Path, ask: Ask) -> None:
    source = f"{folder}/model.py:make"
    assert [ask(source=source)[0], ask(source=source)[0]] == [True, False]
    traced, text = ask(source=source, before=before)
    assert traced
    assert text.startswith(f"dump-ir: note: traced again: {why}\n") == bool(why)


VALUES = {
    "source": ["hf:gpt2"], "--config": ["a=1"], "--meta": [], "--batch": ["3"], "--length": ["3"], "--leaf": ["a"], "--trust": [],
}  # fmt: skip


def test_each_option_of_the_model_is_part_of_the_question() -> None:
    group = next(g for g in parser()._action_groups if g.title == "the model")
    options = {action.option_strings[0] for action in group._group_actions} - {"--no-cache"}
    assert options | {"source"} == VALUES.keys()
    digests = {cache._digest(cache._question(parser().parse_args(["hf:llama"])))}
    for option, value in VALUES.items():
        line = value if option == "source" else ["hf:llama", option, *value]
        digests.add(cache._digest(cache._question(parser().parse_args(line))))
    assert len(digests) == len(VALUES) + 1


def test_each_fact_counts(folder: Path, ask: Ask) -> None:
    ask()
    content = json.loads(entry(folder).read_bytes().partition(b"\n")[2])
    facts = content["facts"]
    evidence.begin()
    assert evidence.change(facts) == ""
    assert {kind for kind, _, _ in facts} == {"file", "status", "names", "modules"}
    for kind, path, answer in facts:
        assert evidence.change([(kind, path, f"{answer}?")])
    paths = {path for _, path, _ in facts}
    import torch

    torch_version = Path(torch.__file__).parent / "version.py"
    for path in (torch_version, ROOT / "stagecut/ir/graph.py", ROOT / "stagecut/tools/dump_ir/cache.py", Path(os.__file__)):
        assert str(path) in paths


# --- what changes nothing -----------------------------------------------------------------------------


def test_what_does_not_matter_is_no_change(folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ask("--stats", "-o", "out")
    os.utime(folder / "helper.py")
    (folder / "notes.txt").write_text("nothing to import")
    (folder / "other.py").write_text("a module that nobody imports")
    (folder.parent / "site-packages" / "other").mkdir()
    for name in ("OMP_NUM_THREADS", "SSH_TTY", "TERM"):
        monkeypatch.setenv(name, "1")
    shown = [ask("--stages", "2", "--stats", "-o", "out"), ask("--split-at", "second"), ask("--report"), ask("--format", "html")]
    assert [traced for traced, _ in shown] == [False] * 4


LOOKS = [
    "", "--stats", "--diff", "--print-after all", "--format json", "--format dot", "--format svg", "--report", "--format html",
    "--report --format json", "--timeline --format json", "--trace-value linear", "--trace-param first.weight", "--only stage=1",
    "--level ops --format dot", "--stages 2", "--passes= ",
]  # fmt: skip


def test_all_looks_are_those_of_the_model(ask: Ask) -> None:
    source, cut = f"{ROOT}/tests/tool_models.py:tied", ["--split-at", "inner"]
    assert ask(source=source)[0]
    for look in LOOKS:
        options = look.split() if "--stages" in look or "--passes" in look else [*look.split(), *cut]
        if "--trace" in look:
            options = ["--trace-param", "inner.bias"]
        traced, expected = ask(*options, "--no-cache", source=source)
        assert traced
        traced, shown = ask(*options, source=source)
        assert not traced
        assert _timeless(shown) == _timeless(expected), look


def _timeless(text: str) -> str:
    """A page without the seconds that passes took."""
    return re.sub(r'"seconds": ?[\d.e-]+', "", text)


@pytest.mark.parametrize(
    ("name", "line", "variable", "counts"),
    [
        ("model.py", "", "FOO", False),
        ("model.py", "", "PS1", False),
        ("model.py", "os.getenv('FOO')", "FOO", True),
        ("model.py", "'FOO' in os.environ", "FOO", True),
        ("model.py", "os.environb.get(b'FOO')", "FOO", True),
        ("model.py", "os.path.expandvars('$FOO')", "FOO", True),
        ("model.py", "os.environ.copy()", "FOO", True),
        ("model.py", "repr(os.environ)", "FOO", True),
        ("model.py", "[*os.environ]", "SSH_TTY", True),
        ("model.py", "os.environ.get('COLUMNS')", "COLUMNS", True),
        ("../site-packages/vendor/__init__.py", "import os; os.getenv('FOO')", "FOO", True),
        ("../site-packages/vendor/__init__.py", "import os; dict(os.environ)", "FOO", True),
        ("../site-packages/vendor/__init__.py", "import os; os.environ.get('COLUMNS')", "COLUMNS", False),
        ("model.py", "", "CUDA_MODULE_LOADING", True),
        ("model.py", "", "TORCH_LOGS", True),
    ],
)
def test_a_variable_counts_where_somebody_reads_it(
    name: str, line: str, variable: str, counts: bool, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C reads those of torch and its libraries, which is not seen: they always count."""
    with (folder / name).open("a") as file:
        file.write(f"{line}\n")
    monkeypatch.delenv(variable, raising=False)
    assert ask()[0]
    monkeypatch.setenv(variable, "0")
    traced, text = ask()
    assert traced == counts
    assert text.startswith(f"dump-ir: note: traced again: other variables of the environment: {variable}\n") == counts
    assert not ask()[0]


ASKS_FOR_THREADS = {
    "torch is asked": ("model.py", "torch.get_num_threads()", True),
    "the model lists all variables": ("model.py", "[*os.environ.items()]", True),
    "the model copies all variables": ("model.py", "os.environ.copy()", True),
    "the model asks in bytes": ("model.py", "os.environb.get(b'OMP_NUM_THREADS')", True),
    "a package lists all variables": ("../site-packages/vendor/__init__.py", "import os; [*os.environ.items()]", False),
    "a package asks": ("../site-packages/vendor/__init__.py", "import os; os.getenv('OMP_NUM_THREADS')", True),
}


@pytest.mark.parametrize(("name", "line", "counts"), ASKS_FOR_THREADS.values(), ids=ASKS_FOR_THREADS.keys())
def test_threads_count_where_somebody_asks(
    name: str, line: str, counts: bool, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with (folder / name).open("a") as file:
        file.write(f"{line}\n")
    assert ask()[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ask()[0] == counts


def test_threads_count_where_a_number_is_computed(folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of float32 has other last digits with another number of threads."""
    adds = MODEL.replace("x = x + 1", "x = x + self.mean")
    computes = "torch.manual_seed(0)\n        self.mean = torch.rand(99).mean().item()\n        self.first ="
    (folder / "model.py").write_text(adds.replace("self.first =", computes))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ask()[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ask()[0]


NUMBERS = {
    "0.35355339059327373": False,
    "0.1": False,
    "0.25": False,
    "3.4028234663852886e+38": False,
    "1.5e+300": False,
    "0.09999999403953552": True,
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_computed_number_is_told_by_its_digits(number: str) -> None:
    assert evidence.has_computed_number(f"%a = aten.mul.Tensor(%x, -{number})") == NUMBERS[number]


COSTS = ["", "--report", "--report --format json", "--report --format svg", "--timeline --format json", "--timeline --format svg"]


@pytest.mark.parametrize("cut", ["--stages 2", "--split-at second"])
def test_a_second_look_at_costs_neither_searches_nor_reckons(cut: str, folder: Path, ask: Ask) -> None:
    """Were the policy or the report asked for again, they would fail."""
    fails = (
        "from stagecut.backend.costs import report, balance\n"
        "def fails(*_, **__): raise RuntimeError('reckoned again')\n"
        "report.report = balance.Balanced.plan = balance.Balanced.refuse_wrong = fails"
    )
    lines = [f"{cut} {look}".split() for look in COSTS]
    expected = [ask(*line, "--no-cache")[1] for line in lines]
    assert [ask(*line)[1] for line in lines] == expected
    assert [ask(*line, before=fails) for line in lines] == [(False, text) for text in expected]
    assert len({*expected}) == len(COSTS)


OTHER_COSTS = ["--stages 3", "--stages 2 --device A100", "--stages 2 --microbatches 4", "--stages 2 --schedule GPipe"]


def test_every_word_that_decides_the_costs_is_part_of_the_question(ask: Ask) -> None:
    ask("--stages", "2", "--report")
    shown = [ask(*line.split(), "--report")[1] for line in OTHER_COSTS]
    assert shown == [ask(*line.split(), "--report", "--no-cache")[1] for line in OTHER_COSTS]
    assert len({*shown}) == len(OTHER_COSTS)


def test_a_search_that_is_done_again_says_why(folder: Path, ask: Ask) -> None:
    """As where another torch would reckon otherwise: the trace counts, the cuts and the report do not."""
    ask("--stages", "2", "--report")
    for kind in ("cuts", "reports"):
        file = entry(folder, kind)
        content = json.loads(file.read_bytes().partition(b"\n")[2])
        content["facts"].append(("file", str(folder / "config.json"), "another"))
        file.write_bytes(_signed(json.dumps(content).encode()))
    traced, text = ask("--stages", "2", "--report")
    assert not traced
    notes = [line for line in text.splitlines() if line.startswith("dump-ir: ")]
    assert notes == [f"dump-ir: note: {done} again: config.json has changed" for done in ("searched", "reckoned")]


def test_a_wrong_search_is_refused_before_the_trace(fresh: Fresh, folder: Path) -> None:
    shown = fresh.run("model.py:make", "--stages", "2", "--device", "X")
    assert (shown.traced, shown.status) == (False, 1)
    assert "device 'X' is not known" in shown.text


def test_notes_are_told_again(folder: Path, ask: Ask) -> None:
    (folder / "whole.py").write_text(
        "import torch\n"
        "class Asks(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 4), Asks()), (torch.ones(2, 4),), {}\n"
    )
    first, second = ask(source="whole.py:make"), ask(source="whole.py:make")
    assert (first[0], second[0]) == (True, False)
    assert first[1] == second[1]
    assert "dump-ir: note: " in first[1]


@pytest.mark.parametrize("option", ["--roles", "--check-each", "--bisect", "--time"])
def test_what_needs_the_model_itself_traces(option: str, ask: Ask) -> None:
    ask()
    assert ask(option)[0]


def test_no_cache_neither_reads_nor_writes(folder: Path, ask: Ask) -> None:
    assert ask("--no-cache")[0]
    assert not (folder.parent / "cache").exists()
    ask()
    content = entry(folder).read_bytes()
    assert ask("--no-cache")[0]
    assert entry(folder).read_bytes() == content


# --- what cannot be known is not kept -----------------------------------------------------------------

SURPRISES = {
    "it changes while it is traced": "open(__file__, 'a').write('#')",
    "a file that it reads is gone": "open(HERE / 'gone').close(); (HERE / 'gone').unlink()",
    "it asks another program": "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
    "it asks the network": "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError: pass",
    "a module appears meanwhile": "there('late'); (HERE / 'late.py').touch()",
    "a file that it asked for appears": "(HERE / 'later').exists(); (HERE / 'later').touch()",
}


@pytest.mark.parametrize("line", SURPRISES.values(), ids=SURPRISES.keys())
def test_a_trace_that_depends_on_more_is_not_kept(line: str, folder: Path, ask: Ask) -> None:
    (folder / "gone").touch()
    (folder / "model.py").write_text(f"{MODEL}\n{line}\n")
    _, text = ask()
    # a file that changed has another reason, which the next look need not have
    assert text.count("dump-ir: note: the trace is not kept for the next look: ") == ("subprocess" in line or "socket" in line)
    assert not (folder.parent / "cache").exists()


IMPORTS_BY_A_PROGRAM = """
import subprocess, sys
class Asks:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "model"):
            subprocess.run([sys.executable, "-S", "-c", ""])
sys.meta_path.insert(0, Asks())
"""


def test_the_gpus_of_the_machine_are_part_of_the_question(tmp_path: Path, ask: Ask) -> None:
    """A model may ask whether one is there."""
    assert evidence.accelerators(f"{tmp_path}/") == []
    gpu = tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0000:01:00.0"
    for folder in (gpu, tmp_path / "dev" / "dri"):
        folder.mkdir(parents=True)
    (tmp_path / "dev" / "nvidia0").touch()
    (tmp_path / "dev" / "sda").touch()
    (gpu / "information").write_text("Model: one")
    (gpu.parent.parent / "version").write_text("570")
    assert evidence.accelerators(f"{tmp_path}/") == ["570", "Model: one", "dri", "nvidia0"]
    plugged = "from stagecut.tools.dump_ir import cache; cache.accelerators = lambda: ['nvidia0']"
    assert (ask()[0], ask(before=plugged)[0], ask(before=plugged)[0], ask()[0]) == (True, True, False, False)


def test_a_program_that_the_import_of_torch_starts_is_not_the_models(folder: Path) -> None:
    """As a torch built for CUDA does. The same from a module of the user's is the model's."""
    (folder / "plain.py").write_text("import torch\ndef make(): return torch.nn.Linear(4, 4), (torch.ones(2, 4),), {}\n")
    (folder / "other.py").write_text("import model\nfrom plain import make\n")
    (folder / "model.py").write_text("")
    code = f"{IMPORTS_BY_A_PROGRAM}\nfrom stagecut.tools.dump_ir.main import main; main(sys.argv[1:])"
    notes: list[str] = []
    for source in ("plain.py:make", "other.py:make"):
        command = [sys.executable, "-c", code, source, "--stats"]
        notes.append(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    assert notes[0] == ""
    assert "starts a program or asks the network (subprocess.Popen)" in notes[1]
    assert entry(folder)


def test_a_file_that_the_model_writes_for_itself_is_no_fact(folder: Path, ask: Ask) -> None:
    line = "import tempfile\nwith tempfile.NamedTemporaryFile('w') as file:\n    open(file.name).read()"
    (folder / "model.py").write_text(f"{MODEL}\n{line}\n")
    assert (ask()[0], ask()[0]) == (True, False)


def test_a_module_that_changed_after_its_import_is_not_kept(folder: Path, ask: Ask) -> None:
    before = f"import sys; sys.path.insert(0, {str(folder)!r}); import helper; open(helper.__file__, 'a').write('#')"
    assert ask(before=before)[0]
    assert not (folder.parent / "cache").exists()


# --- the files ----------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "no text": lambda content: b"\xff\xfe\n" + content,
    "no JSON": lambda content: _signed(b"{"),
    "another form": lambda content: _signed(b'{"format": 1}'),
    "a list": lambda content: _signed(b"[1]"),
}


def _signed(content: bytes) -> bytes:
    return sha256(content).hexdigest().encode() + b"\n" + content


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_none(damage: Callable[[bytes], bytes], folder: Path, ask: Ask) -> None:
    _, expected = ask()
    entry(folder).write_bytes(damage(entry(folder).read_bytes()))
    assert ask() == (True, expected)
    assert ask() == (False, expected)


def test_the_cache_may_be_deleted(folder: Path, ask: Ask) -> None:
    ask()
    shutil.rmtree(folder.parent / "cache")
    assert (ask()[0], ask()[0]) == (True, False)


def test_a_cache_that_cannot_be_written_is_none(folder: Path, ask: Ask) -> None:
    (folder.parent / "cache").write_text("a file")
    assert (ask()[0], ask()[0]) == (True, True)


def test_an_entry_appears_whole_or_not_at_all(folder: Path, ask: Ask) -> None:
    ask(before="from pathlib import Path\ndef fails(*_): raise OSError('no space left')\nPath.replace = fails")
    assert [*(folder.parent / "cache" / "traces").iterdir()] == []


def test_old_entries_are_deleted(folder: Path, ask: Ask) -> None:
    for leaf in ("first", "second", "first", ""):
        ask(*(["--leaf", leaf] if leaf else []), before=f"{IN_CACHE}MOST_KEPT = 2")
    assert len([*(folder.parent / "cache" / "traces").iterdir()]) == 2
    assert [ask()[0], ask("--leaf", "second")[0], ask("--leaf", "first")[0]] == [False, False, True]


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("STAGECUT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/stagecut")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/me/.cache/stagecut")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/me")
    assert cache_folder() == Path("/var/me/stagecut")
    monkeypatch.setenv("STAGECUT_CACHE", "here")
    assert cache_folder() == Path("here")


def test_an_answer_from_the_cache_loads_neither_torch_nor_the_model(tmp_path: Path) -> None:
    """Two processes, with an architecture of transformers: its files are among the facts."""
    code = "import sys; from stagecut.tools.dump_ir.main import main; main(sys.argv[1:])\nprint('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "hf:gpt2", "--config", "n_layer=1", "--stages", "2", "--report"]
    variables = os.environ | {"STAGECUT_CACHE": str(tmp_path)}
    first, second = (subprocess.run(command, env=variables, capture_output=True, text=True, check=True) for _ in range(2))
    assert (first.stderr, second.stderr) == ("True\n", "False\n")
    assert first.stdout == second.stdout
    (file,) = (tmp_path / "traces").iterdir()
    facts = json.loads(file.read_bytes().partition(b"\n")[2])["facts"]
    assert any(path.endswith("transformers/models/gpt2/modeling_gpt2.py") for _, path, _ in facts)
    assert any(path.endswith("transformers/__init__.py") for _, path, _ in facts)


def test_no_cache_is_an_option_like_others() -> None:
    assert named(parser(), ["m.py:f", "--no-cache"]) == {"no_cache"}
