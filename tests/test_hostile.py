"""No file of this project runs a shell, or runs or unpacks untrusted content."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path.relative_to(ROOT)
    for folder in ("dseqjepa", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

SHELLS = {
    "os.system", "os.popen", "os.execl", "os.execle", "os.execlp", "os.spawnl", "os.spawnlp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput", "pty.spawn",
    "asyncio.create_subprocess_shell",
}  # fmt: skip
STARTS = {
    "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call",
    "subprocess.check_output",
}  # fmt: skip
RUNS_WHAT_IT_READS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load",
    "cloudpickle.loads", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module",
    "importlib.util.spec_from_file_location", "numpy.load", "np.load",
    "torch.distributed.all_gather_object", "torch.distributed.broadcast_object_list",
    "torch.distributed.gather_object", "torch.distributed.scatter_object_list",
    "torch.distributed.send_object_list", "torch.distributed.recv_object_list",
}  # fmt: skip
UNPACKS = {"shutil.unpack_archive", "tarfile.open", "tarfile.TarFile", "py7zr.SevenZipFile"}
METHODS = {"extract", "extractall"}  # of an archive


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call and the name it is made by, with what was imported under another name undone."""
    tree = ast.parse(source)
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            full |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            full |= {name.asname: name.name for name in node.names if name.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield full.get(first, first) + dot + rest, node


def shells(source: str) -> list[str]:
    """Calls that go through a shell, or that hand over a command as one string."""
    found = []
    for name, call in calls(source):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        shell = keywords.get("shell")
        is_off = isinstance(shell, ast.Constant) and shell.value is False
        if name in SHELLS or (shell is not None and not is_off):
            found.append(name)
        elif name in STARTS:
            (command, *_) = [*call.args, keywords.get("args")]
            if isinstance(command, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append(name)
    return found


def runs_what_it_reads(source: str) -> list[str]:
    """Calls that run what they read: pickles, YAML tags, code in strings."""
    found = []
    for name, call in calls(source):
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        runs = name in RUNS_WHAT_IT_READS
        if name == "torch.load":
            runs = said.get("weights_only") != "True"
        elif name in ("numpy.load", "np.load"):
            runs = said.get("allow_pickle") != "False"
        elif name == "importlib.import_module":
            runs = not is_own_module(call.args[0])
        if runs:
            found.append(name)
    return found


def is_own_module(name: ast.expr) -> bool:
    """`f"dseqjepa...."` or `f"tests...."`: no string from outside chooses the package."""
    text = name.values[0] if isinstance(name, ast.JoinedStr) and name.values else name
    value = text.value if isinstance(text, ast.Constant) else ""
    return str(value).startswith(("dseqjepa.", "tests."))


def unpacks(source: str, may_open: bool = False) -> list[str]:
    """Calls that write what an archive holds to where the archive says."""
    found = []
    for name, _ in calls(source):
        is_method = not name.startswith("dseqjepa.") and name.rpartition(".")[2] in METHODS
        if is_method or (name in UNPACKS and not (may_open and name == "tarfile.open")):
            found.append(name)
    return found


def may_open_tar(path: Path) -> bool:
    """Shards are listed and written; nothing is taken out of them by name."""
    return "shards" in path.parts


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_command_goes_through_a_shell(path: Path) -> None:
    assert shells((ROOT / path).read_text()) == []


PACKAGE = [path for path in FILES if path.parts[0] == "dseqjepa"]


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_nothing_that_is_read_is_run_and_no_archive_is_unpacked(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert runs_what_it_reads(source) == []
    assert unpacks(source, may_open_tar(path)) == []


def test_a_foreign_file_is_read_in_one_place() -> None:
    readers = [
        str(path)
        for path in PACKAGE
        for name, _ in calls((ROOT / path).read_text())
        if name == "torch.load"
    ]
    assert readers == ["dseqjepa/train/foreign.py"]


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.run(['ls'], shell=flag)",
        "from subprocess import Popen\nPopen('ls -l')",
        "from subprocess import check_output as c\nc(f'ls {x}')",
        "import subprocess\nsubprocess.run(args='ls ' + x)",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
    ],
)
def test_a_shell_is_seen(line: str) -> None:
    assert shells(line)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as l\nl(b)",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch as t\nt.load(p, weights_only=flag)",
        "import yaml\nyaml.load(f, Loader)",
        "eval(x)",
        "exec(open(x).read())",
        "import numpy as np\nnp.load(p)",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "import importlib\nimportlib.import_module(name)",
        "import importlib\nimportlib.import_module(f'{name}.x')",
    ],
)
def test_what_runs_what_it_reads_is_seen(line: str) -> None:
    assert runs_what_it_reads(line)


@pytest.mark.parametrize(
    "line",
    [
        "import tarfile\ntarfile.open(p).extractall(q)",
        "archive.extract(member)",
        "from shutil import unpack_archive as u\nu(p)",
    ],
)
def test_what_unpacks_is_seen(line: str) -> None:
    assert unpacks(line)


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess\nsubprocess.run(['ls', x])",
        "import subprocess\nsubprocess.run([*a, b], shell=False)",
        "import torch\ntorch.load(p, weights_only=True)",
        "import yaml\nyaml.safe_load(f)",
        "import importlib\nimportlib.import_module(f'dseqjepa.{x}')",
    ],
)
def test_what_is_allowed_is_not_reported(line: str) -> None:
    assert not shells(line) + runs_what_it_reads(line) + unpacks(line)
