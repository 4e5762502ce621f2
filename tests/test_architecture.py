"""Rules for the package's files, and which may import which."""

from __future__ import annotations

import ast

import pytest

import dseqjepa
from tests.architecture import BLOCK, FILES, PAGE, drawing, imported, part

MOST_LINES = 105
"""Of the longest function, without its docstring; files may be as long as their subject is."""

BASE = {"errors", "files", "keyed", "provenance", "rendezvous", "ranks"}
MODEL = BASE | {"config", "commands", "plans", "model"}
EVALUATION = MODEL | {"data", "train.checkpoint", "train.metrics", "train.trained_on"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "files": {"errors"},
    "kernels": set(),
    "keyed": set(),
    "provenance": {"errors"},
    "rendezvous": {"errors"},
    "ranks": {"errors", "rendezvous"},
    "arguments": {"errors"},
    "ending": {"errors"},
    "settings": {"errors"},
    "config": {"errors", "settings"},
    "commands": {"config"},
    "plans": BASE,
    "data": BASE,
    "model": BASE | {"config", "plans"},
    "methods": MODEL,
    "presets": {"errors", "settings", "config", "methods.dseqjepa"},
    "train": MODEL | {"methods", "data", "console"},
    "tasks": EVALUATION
    | {
        "console",
        "presets",
        "train.foreign",
        "train.others",
        "train.runtime",
        "train.optimizer",
        "train.schedules",
        "train.clock",
        "train.log",
        "train.folder",
    },
    "describe": {"errors", "settings", "config", "commands", "tasks.config"},
    "export": EVALUATION | {"tasks", "train.pretrain"},
    "viz": EVALUATION | {"methods", "tasks.features"},
    "report": EVALUATION | {"presets", "train.monitor", "viz"},
    "embeddings": EVALUATION | {"console", "tasks", "train.runtime", "viz"},
    "studies": EVALUATION
    | {
        "console",
        "presets",
        "settings",
        "tasks.config",
        "tasks.table",
        "train.folder",
        "train.clock",
        "viz",
        "report",
    },
    "preflight": EVALUATION | {"methods", "train", "viz"},
    "forecast": MODEL | {"methods", "data", "train.rehearsal"},
    "demo": EVALUATION | {"methods", "train", "tasks", "viz", "report"},
    "__init__": EVALUATION
    | {"methods", "presets", "embeddings", "train", "viz.sheet", "viz.trace"},
    "cli": EVALUATION
    | {
        "arguments",
        "ending",
        "describe",
        "kernels",
        "presets",
        "methods",
        "train",
        "tasks",
        "export",
        "embeddings",
        "viz",
        "report",
        "studies",
        "demo",
    }
    | {"preflight", "forecast", "__init__"},
    "__main__": {"cli"},
}
"""Part of the package -> the parts, or single modules, that it may stand on beside itself."""

AT_IMPORT = {"cli": {"arguments", "ending", "errors", "kernels"}, "__init__": set()}
"""What these load at once; the rest waits until it is needed, so that --help stays quick."""


def forbidden(module: str, source: str, everywhere: bool = True) -> set[str]:
    """What a module imports and may not."""
    mine = part(module)
    allowed = MAY_IMPORT[mine] if everywhere else AT_IMPORT.get(mine, MAY_IMPORT[mine])
    return {
        name
        for name in imported(source, everywhere)
        if name.split(".")[0] not in allowed | {mine} and name not in allowed
    }


def calls(source: str, name: str) -> bool:
    nodes = ast.walk(ast.parse(source))
    return any(isinstance(n, ast.Call) and ast.unparse(n.func) == name for n in nodes)


def swallowed(source: str) -> list[int]:
    """Lines of handlers that catch everything and raise nothing."""
    lines = []
    for handler in ast.walk(ast.parse(source)):
        if isinstance(handler, ast.ExceptHandler):
            caught = {ast.unparse(node) for node in ast.walk(handler.type or ast.Name("Exception"))}
            raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
            if caught & {"Exception", "BaseException"} and not raises:
                lines.append(handler.lineno)
    return lines


NO_TEXT = ("Image", "gzip", "tarfile", "store", "self", "os", "fs")
"""What opens other things than text files."""


def opened_as_text(source: str) -> list[int]:
    """The lines in which a text file is opened without a word on its encoding."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        receiver, _, method = ast.unparse(call.func).rpartition(".")
        mode = next(iter(call.args[not receiver :]), None) if method == "open" else None
        is_text = method in ("read_text", "write_text") or (
            method == "open"
            and receiver not in NO_TEXT
            and not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        )
        if is_text and not any(keyword.arg == "encoding" for keyword in call.keywords):
            found.append(call.lineno)
    return found


# The rules hold


@pytest.mark.parametrize("module", FILES)
def test_every_text_file_says_its_encoding(module: str) -> None:
    """It would be that of the machine's language otherwise."""
    assert opened_as_text(FILES[module].read_text()) == []


def test_a_text_file_without_its_encoding_is_found() -> None:
    source = "open(p)\nopen(p, 'rb')\nq.open('a')\nq.open('ab')\nq.read_text()\n"
    source += "q.write_text(t, encoding='utf-8')\nopen(p, encoding='utf-8')\nImage.open(p)\n"
    assert opened_as_text(source) == [1, 3, 5]


@pytest.mark.parametrize("module", FILES)
def test_a_module_stands_on_lower_ones_alone(module: str) -> None:
    source = FILES[module].read_text()
    assert forbidden(module, source) == set()
    assert forbidden(module, source, everywhere=False) == set()


def test_every_part_of_the_package_has_its_rule() -> None:
    assert {part(module) for module in FILES} <= MAY_IMPORT.keys()


def test_no_rule_leads_round() -> None:
    order = list(MAY_IMPORT)
    for index, allowed in enumerate(MAY_IMPORT.values()):
        assert not {name for name in allowed if order.index(part(f".{name}")) > index}


def test_the_drawing_shows_the_imports() -> None:
    """`python -m tests.architecture` draws it again."""
    assert BLOCK.findall(PAGE.read_text(encoding="utf-8")) == [drawing()]


def test_public_names_come_from_where_they_live() -> None:
    for name, home in dseqjepa._HOME.items():
        assert f"dseqjepa.{home}" in FILES or f"dseqjepa.{home}.__init__" in FILES
        assert home.split(".")[0] not in ("cli", "demo")
        assert getattr(dseqjepa, name).__name__ == name
    assert sorted(dseqjepa._HOME) == sorted(set(dseqjepa.__all__) - {"__version__"})
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dseqjepa.nothing


@pytest.mark.parametrize("module", FILES)
def test_a_file_says_what_it_is_and_its_functions_are_short(module: str) -> None:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= MOST_LINES, f"{node.name} has {lines} lines: split it"


def test_no_two_classes_share_a_name() -> None:
    """A word means one thing; what only its own file knows of begins with an underscore."""
    found: dict[str, list[str]] = {}
    for module, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", FILES)
def test_only_commands_print_and_no_error_is_swallowed(module: str) -> None:
    source = FILES[module].read_text()
    assert part(module) in ("cli", "demo", "ending", "tasks") or not calls(source, "print")
    assert swallowed(source) == []


# The rules see what they are for


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dseqjepa.plans.plan", "from dseqjepa.model.vit import Images"),
        ("dseqjepa.plans.plan", "from dseqjepa.config import Config"),
        ("dseqjepa.plans.plan", "from dseqjepa import model"),
        ("dseqjepa.plans.plan", "def late():\n    import dseqjepa.train.loop"),
        ("dseqjepa.data.images", "import dseqjepa.config as c"),
        ("dseqjepa.model.vit", "from dseqjepa.methods import build_method"),
        ("dseqjepa.methods.base", "from dseqjepa.train import checkpoint"),
        ("dseqjepa.tasks.knn", "from dseqjepa.train.loop import Trainer"),
        ("dseqjepa.tasks.knn", "from dseqjepa.train import checkpoint, loop"),
        ("dseqjepa.viz.regions", "from dseqjepa.tasks import knn"),
        ("dseqjepa.viz.regions", "from dseqjepa.report import page"),
        ("dseqjepa.report.run", "from dseqjepa.train.loop import Trainer"),
        ("dseqjepa.report.run", "from dseqjepa.tasks import knn"),
        ("dseqjepa.train.loop", "if True:\n    from dseqjepa.cli import main"),
        ("dseqjepa.config", "from dseqjepa.keyed import Stream"),
        ("dseqjepa.config", "import dseqjepa"),
    ],
)
def test_an_import_upwards_is_seen(module: str, source: str) -> None:
    assert forbidden(module, source)


def test_what_is_allowed_late_only_is_seen_at_import() -> None:
    for module, line in (
        ("dseqjepa.cli", "from dseqjepa.train.loop import Trainer"),
        ("dseqjepa.__init__", "from dseqjepa.config import Config"),
    ):
        assert forbidden(module, line, everywhere=False)
        assert not forbidden(module, f"def late():\n    {line}", everywhere=False)
        assert not forbidden(module, line)


def test_a_swallowed_error_and_a_print_are_seen() -> None:
    for caught in ("", " Exception", " BaseException as e", " (ValueError, Exception)"):
        assert swallowed(f"try:\n    x\nexcept{caught}:\n    pass") == [3]
    assert swallowed("try:\n    x\nexcept Exception as e:\n    raise ValueError from e") == []
    assert swallowed("try:\n    x\nexcept ValueError:\n    pass") == []
    assert calls("def f():\n    print(1)", "print")
    assert not calls("console.print(1)", "print")
