"""From what a person wrote to plain values, and from a model's complaints back to a person.

`config.py` says what is right; here is the text around it: YAML files, `section.key=value`
overrides, and one line for all that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dseqjepa.errors import InputError, did_you_mean

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "two numbers in brackets",
    "model": "a section, whose keys are set one by one",
}
"""What pydantic's types of error expected, by their first word."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file; nothing in it is run. `InputError` if it is anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror}; give a preset or a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config file {path} is not plain YAML: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"config file {path}: expected sections, found {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change nested values by one `section.key=value`, whose value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"expected section.key=value, found {override!r}")
    # A path is what it says: a folder may be called 2023, or no.
    value = text if key == "data.source" else _value(key, text)
    *sections, leaf = key.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"{key}: {section!r} is a value, not a section")
        place = inner
    if key == "method.name" and place.get("name") != value:
        place.clear()  # another method has other keys: start from its defaults
    if key == "model.name" and place.get("name") != value:
        for size in ("width", "depth", "heads"):  # these belong to the name before
            place.pop(size, None)
    place[leaf] = value


def _value(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{key}: cannot read the value {text!r} as YAML") from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3, which has no dot, as text
        except ValueError:
            return value
    return value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """All that is wrong, in one line: for each key what was expected, and what was found."""
    lines: dict[str, str] = {}
    for item in error.errors():
        key, message = _explain(item, root)
        # A value that may be of two types has two errors, for example "a whole number" or "'auto'".
        lines[key] = f"{lines[key]} or {message}" if key in lines else message
        lines[key]
    return "; ".join(lines.values())
