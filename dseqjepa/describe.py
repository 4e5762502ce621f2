"""Descriptions of every setting, from the docstrings of its config class.

Defaults are those of the classes; presets override them (`dseqjepa presets NAME --print-config`).
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dseqjepa.commands import COMMANDS
from dseqjepa.config import Config
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.settings import sections_of
from dseqjepa.tasks.config import TASKS

WIDTH = 100
INDENT = 6 * " "
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe_settings(section: str | None = None) -> Iterator[str]:
    """Lines describing the settings of a section and its subsections, or a single setting; of all
    sections if None.

    Raises:
        InputError: there is no such section or setting; the nearest one is named.
    """
    known = _sections()
    if section is None or section in known:
        return _lines(known, section)
    if found := _setting(known, section):
        return iter(found)
    hint = did_you_mean(section, [*known, *_keys(known)])
    raise InputError(f"there is no section or setting {section!r}{hint}")


def section_names() -> list[str]:
    """What `describe_settings` takes."""
    return list(_sections())


def _sections() -> dict[str, list[type[BaseModel]]]:
    known: dict[str, list[type[BaseModel]]] = dict(_walk("", Config))
    for name, model in (TASKS | COMMANDS).items():
        known[name] = [model]
        known |= dict(_walk(f"{name}.", model))
    return known


def _lines(known: dict[str, list[type[BaseModel]]], section: str | None) -> Iterator[str]:
    for name, models in known.items():
        if section is not None and name != section and not name.startswith(f"{section}."):
            continue
        seen: set[str] = set()
        for model in models:
            which = f" name={model.model_fields['name'].default}" if len(models) > 1 else ""
            yield f"{name}{which}: {_sentence(model.__doc__ or '')}"
            for key, field in model.model_fields.items():
                if key not in seen and not sections_of(model, key):
                    yield from _described(key, field)
                seen.add(key)
        yield ""


def _setting(known: dict[str, list[type[BaseModel]]], name: str) -> list[str]:
    """The settings of that name, with or without their section."""
    lines: list[str] = []
    for full, field in _keys(known).items():
        if name in (full, full.rpartition(".")[2]):
            lines += _described(full, field)
    return lines


def _keys(known: dict[str, list[type[BaseModel]]]) -> dict[str, FieldInfo]:
    return {
        f"{section}.{key}": field
        for section, models in known.items()
        for model in reversed(models)  # of several that have it, the first one's is described
        for key, field in model.model_fields.items()
        if not sections_of(model, key)
    }


def _described(name: str, field: FieldInfo) -> Iterator[str]:
    yield f"  {name}  {_type(field.annotation)}{_bounds(field.metadata)}, default {_text(field)}"
    text = field.description or ""
    yield from wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def _walk(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """Every section below a model: its dotted name, and the classes that it may have."""
    for key in model.model_fields:
        if inner := sections_of(model, key):
            yield f"{prefix}{key}", inner
            below: dict[str, list[type[BaseModel]]] = {}
            for each in inner:
                below |= dict(_walk(f"{prefix}{key}.", each))
            yield from below.items()


def _sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        inner = [_type(each) if each is not Ellipsis else "..." for each in get_args(annotation)]
        return f"[{', '.join(inner)}]"
    if metadata := getattr(annotation, "__metadata__", None):
        return _type(get_args(annotation)[0]) + _bounds(metadata)
    if parts := [each for each in get_args(annotation) if each is not type(None)]:
        return " | ".join(map(_type, parts))
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true | false"}
    return names.get(getattr(annotation, "__name__", ""), str(annotation))


def _bounds(metadata: Any) -> str:
    found = [
        f"{sign} {getattr(each, name)}"
        for item in metadata
        for each in (item.metadata if isinstance(item, FieldInfo) else [item])
        for name, sign in BOUNDS.items()
        if getattr(each, name, None) is not None
    ]
    return f" {' and '.join(found)}" if found else ""


def _text(field: FieldInfo) -> str:
    if field.is_required():
        return "none: has to be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
