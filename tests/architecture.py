"""Read the package's imports and draw them in docs/architecture.md.

`python -m tests.architecture` redraws; tests/test_architecture.py fails while the drawing is stale.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import dseqjepa

PACKAGE = Path(dseqjepa.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PAGE = PACKAGE.parent / "docs/architecture.md"
BLOCK = re.compile(r"^```mermaid\n(.*?)^```", re.MULTILINE | re.DOTALL)


def part(module: str) -> str:
    """`dseqjepa.data.images` belongs to `data`, `dseqjepa.cli` is `cli`."""
    return module.split(".")[1]


def statements(tree: ast.AST, everywhere: bool) -> Iterator[ast.AST]:
    """All nodes; or those that run when the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if everywhere or not (is_function or is_typing):
            yield node
            yield from statements(node, everywhere)


def imported(source: str, everywhere: bool = True) -> set[str]:
    """The package's own modules that a source imports, `plans.regions` for short."""
    found = set()
    for node in statements(ast.parse(source), everywhere):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    own = {name for name in found if name.split(".")[0] == "dseqjepa"}
    return {name.partition(".")[2] or "__init__" for name in own}


def dependencies() -> dict[str, set[str]]:
    """Part -> the parts that it imports. Single modules that import nothing above them, such as
    `errors`, are left out; so is `__init__`, whose names load on first use."""
    found: dict[str, set[str]] = {}
    for module, path in FILES.items():
        names = {part(f".{name}") for name in imported(path.read_text(encoding="utf-8"))}
        found.setdefault(part(module), set()).update(names)
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    drawn = packages | {"config", "presets", "preflight", "demo", "cli"}
    return {name: (below & drawn) - {name} for name, below in found.items() if name in drawn}


def drawing() -> str:
    """Mermaid code; an import that a longer path implies is not drawn."""
    below = dependencies()

    def reached(name: str) -> set[str]:
        return below[name].union(*(reached(other) for other in below[name]))

    lines = ["graph TD"]
    for name in sorted(below):
        implied = {far for near in below[name] for far in reached(near)}
        lines += [f"    {name} --> {other}" for other in sorted(below[name] - implied)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: f"```mermaid\n{drawing()}```", page), encoding="utf-8")
