"""The pages of the site that are not files in docs/: generated from the code, or taken from
elsewhere in the repository, each time the site is built.

mkdocs calls the functions named `on_...`.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from html import unescape
from pathlib import Path
from textwrap import dedent

import latex2mathml.converter
import networkx
import typer.cli
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dseqjepa import _HOME, cli
from dseqjepa.describe import describe_settings
from dseqjepa.presets import describe, preset, preset_names

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "docs/own_pictures.ipynb": "own_pictures.md",
}
"""Documents of the repository that mkdocs does not find by itself -> their pages."""
DRAWING = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(
    r"^(?P<fence>`{3,})[^`\n]*\n.*?^(?P=fence)$|\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]+)?\)",
    re.MULTILINE | re.DOTALL,
)
"""A link to another file; or a whole block of code, in which there are none."""
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
EXAMPLES = re.compile(r"^\x08?\n?Examples:\n((?:  .*\n?)+)", re.MULTILINE)
LIST = re.compile(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", re.MULTILINE)
ASIDE = "---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n"
"""Of pages that show code."""
SECTION = re.compile(r"(?P<name>\S+)(?: name=(?P<kind>\S+))?: (?P<text>.*)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {
        "commands.md": commands(),
        "settings.md": settings(),
        "presets.md": presets(),
        "api.md": api(),
    }
    for source, page in DOCUMENTS.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        pages[page] = notebook(text) if source.endswith(".ipynb") else text
    linked = linked_code()
    for path in linked:
        is_folder = (ROOT / path).is_dir()
        pages[page_of(path)] = listing(path, linked) if is_folder else code(path)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository lead to pages of the site; drawings become SVG."""
    uri = page.file.src_uri
    markdown = DRAWING.sub(lambda found: drawing(found[1]), markdown)
    return LINK.sub(lambda found: link(found, uri), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML, which browsers draw without a script."""

    def drawn(found: re.Match[str]) -> str:
        kind = "block" if found[1] == "div" else "inline"
        maths = latex2mathml.converter.convert(unescape(found[2]).strip(), display=kind)
        return f'<{found[1]} class="maths">{maths}</{found[1]}>'

    return MATHS.sub(drawn, html)


# Reference, from the code


def commands() -> str:
    """Every command's own help."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("dseqjepa", [], resilient_parsing=True)
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="dseqjepa", title="Commands")
    text = EXAMPLES.sub(lambda found: f"\n**Examples**:\n\n```sh\n{dedent(found[1])}```\n", text)
    text = LIST.sub("", text)  # the page's own contents, with descriptions cut short
    return text.replace("```console\n$ ", "```text\n")


def settings() -> str:
    """What `dseqjepa settings` prints, with a heading for each section."""
    lines = [
        "# Settings",
        "",
        "`dseqjepa settings SECTION` prints the same. Defaults are those of the classes, which "
        "[presets](presets.md) override. The sections of a run come first, then evaluations and "
        "other commands.",
    ]
    heading = ""
    for line in describe_settings():
        text = line.strip()
        if line.startswith("      "):
            lines.append(f"    {text}")
        elif line.startswith("  "):
            key, _, kind = text.partition("  ")
            lines += ["", f"`{key}` *{kind}*", ":   "]
        elif found := SECTION.fullmatch(line):
            if found["name"] != heading:
                heading = found["name"]
                lines += ["", f"## {heading}"]
            kind = f"`name={found['kind']}`: " if found["kind"] else ""
            lines += ["", kind + found["text"]]
        elif text:
            raise ValueError(f"`dseqjepa settings` prints a line of another form: {line!r}")
    return "\n".join(lines)


def presets() -> str:
    """Every preset's description, and one config for each backbone."""
    text = (
        "# Presets\n\n`dseqjepa presets` lists them. Those of one backbone differ in `method`; the "
        "config of DSeq-JEPA's is shown. `dseqjepa presets NAME --print-config` prints any.\n"
    )
    for name in preset_names():
        method, _, rest = describe(name).partition("\n")
        text += f"\n## {name}\n\n`{method}`\n\n{rest}\n"
        if name.startswith("dseq_"):
            text += f"\n```yaml\n{preset(name).to_yaml()}```\n"
    return text


def api() -> str:
    """Every public name of the package, from its docstring."""
    text = "# Python API\n\n[Using encoders from Python](python.md) shows these names at work.\n"
    return text + "".join(f"\n::: dseqjepa.{home}.{name}\n" for name, home in sorted(_HOME.items()))


# Other documents


def notebook(text: str) -> str:
    """The cells of a notebook."""
    return "\n\n".join(
        cell["source"] if cell["cell_type"] == "markdown" else f"```python\n{cell['source']}\n```"
        for cell in json.loads(text)["cells"]
    )


def linked_code() -> set[str]:
    """The files and folders of code to which documents link."""
    found = set()
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        folder = path.parent.relative_to(ROOT).as_posix()
        for each in LINK.finditer(path.read_text(encoding="utf-8")):
            if each["target"]:
                found.add(posixpath.normpath(posixpath.join(folder, each["target"])))
    return {path for path in found if page_of(path).startswith("source/")}


def page_of(path: str) -> str:
    """The page of a path in the repository."""
    if path == "docs":
        return "index.md"
    is_document = path.startswith("docs/") and not path.endswith(".py")
    return DOCUMENTS.get(path, path.removeprefix("docs/") if is_document else f"source/{path}.md")


def path_of(page: str) -> str:
    """The path in the repository of what a page shows."""
    if page.startswith("source/"):
        return page.removeprefix("source/").removesuffix(".md")
    return next((path for path, its in DOCUMENTS.items() if its == page), f"docs/{page}")


def link(found: re.Match[str], page: str) -> str:
    """A link as it is in the repository, made relative to the page that it is on."""
    if found["fence"]:
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(path_of(page)), found["target"]))
    target = posixpath.relpath(page_of(path), posixpath.dirname(page) or ".")
    return f"]({target}{found['anchor'] or ''})"


def code(path: str) -> str:
    """A file as a page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = path.rpartition(".")[2] if path.endswith((".py", ".yaml")) else "text"
    return f"{ASIDE}# {path}\n\n`````{language}\n{text}`````\n"


def listing(path: str, linked: set[str]) -> str:
    """The modules of a folder with the first line of each docstring, and links where there are
    pages."""
    text = f"{ASIDE}# {path}/\n\n"
    for file in sorted((ROOT / path).glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        place = f"{posixpath.basename(path)}/{file.name}"
        name = f"[{file.name}]({place})" if f"{path}/{file.name}" in linked else f"`{file.name}`"
        text += f"- {name}: {docstring.splitlines()[0]}\n"
    return text


# Drawings

BOX, GAP = (120, 34), (24, 40)


def drawing(mermaid: str) -> str:
    """A graph of `A --> B` lines as SVG, which needs no script: every arrow points downwards."""
    graph = networkx.DiGraph(re.findall(r"(\w+) --> (\w+)", mermaid))
    layer = {
        name: depth
        for depth, names in enumerate(networkx.topological_generations(graph))
        for name in names
    }
    reach = {name: max((layer[b] - layer[name] for b in graph[name]), default=0) for name in layer}
    place: dict[str, tuple[float, float]] = {}
    for depth in range(max(layer.values()) + 1):
        names = sorted((name for name in layer if layer[name] == depth), key=reach.__getitem__)
        # Below their importers; where these do not tell, the arrows that go far start outside.
        above = {
            name: sum(place[each][0] for each in graph.pred[name]) / max(graph.in_degree(name), 1)
            for name in names
        }
        side = {name: i * (-1) ** i for i, name in enumerate(names)}
        names.sort(key=lambda name: (above[name], side[name]))
        for column, name in enumerate(names):
            x = (column - (len(names) - 1) / 2) * (BOX[0] + GAP[0])
            place[name] = (x, depth * (BOX[1] + GAP[1]))
    half = max(abs(x) for x, _ in place.values()) + BOX[0] / 2 + 1
    height = max(y for _, y in place.values()) + BOX[1] + 2
    shapes = []
    for a, b in graph.edges:
        (x, y), (to_x, to_y) = place[a], place[b]
        y += BOX[1]
        start, bend = to_y - GAP[1], to_y - GAP[1] / 2  # past the boxes between, then across
        shapes.append(
            f'<path d="M{x:g},{y:g} V{start:g} C{x:g},{bend:g} {to_x:g},{bend:g} '
            f'{to_x:g},{to_y - 5:g}"/>'
        )
    for name, (x, y) in place.items():
        shapes.append(
            f'<rect x="{x - BOX[0] / 2:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}"/>'
        )
        shapes.append(f'<text x="{x:g}" y="{y + BOX[1] / 2:g}">{name}</text>')
    return (
        f'<svg class="graph" viewBox="{-half:g} -1 {2 * half:g} {height:g}" role="img" '
        f'style="max-width:{2 * half:g}px" aria-label="Arrows between {len(place)} parts">'
        '<marker id="tip" viewBox="0 0 6 6" refX="1" refY="3" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0,0 6,3 0,6z"/></marker>'
        f"{''.join(shapes)}</svg>"
    )
