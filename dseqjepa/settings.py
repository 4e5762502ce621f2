"""From what a person wrote to plain values, and from a model's complaints back to a person.

`config.py` says what is right; here is the text around it: YAML files, `section.key=value`
overrides, and one line for all that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dseqjepa.errors import InputError, did_you_mean

MOST_TEXT = 2**20
"""Characters of a config file."""
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "two numbers in brackets",
    "missing": "two numbers in brackets",
    "too": "two numbers in brackets",
    "model": "a section, whose keys are set one by one",
}
"""What pydantic's types of error expected, by their first word."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file; nothing in it is run. `InputError` if it is anything else."""
    try:
        with path.expanduser().open(encoding="utf-8") as file:
            text = file.read(MOST_TEXT + 1)
        if len(text) > MOST_TEXT:
            raise InputError(f"config file {path} has more than {MOST_TEXT} characters")
        values = _plain(text)
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror}; give a preset or a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config file {path} is not plain YAML: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"config file {path}: expected sections, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"write the value in place of *{event.anchor}{event.start_mark}")
        return super().compose_node(parent, index)


def _plain(text: str) -> Any:
    """The values of a YAML text; `yaml.YAMLError` if it is anything else."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


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
        value = _plain(text)
    except yaml.YAMLError:
        raise InputError(f"{key}: cannot read the value {text[:200]!r} as YAML") from None
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3, which has no dot, as text
        except ValueError:
            return value
    return value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """All that is wrong, in one line: each key, what it must be, and what was found."""
    says: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for item in error.errors():
        key, section = _walk(item["loc"], root)
        name = key.rpartition(".")[2]
        kind, message, found = item["type"], item["msg"], item["input"]
        if kind in ("extra_forbidden", "invalid_key"):
            elsewhere = sorted(k for k in _leaves(root) if k.rpartition(".")[2] == name)
            hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
            says[key] = f"unknown key {key!r}{hint or did_you_mean(name, section.model_fields)}"
        elif kind == "value_error":
            message = message.removeprefix("Value error, ")
            says[key] = message if key in message else f"{key}: {message}"
        elif kind == "missing" and isinstance(item["loc"][-1], str):
            says[key] = f"{key} is missing"
        elif kind.startswith("union_tag"):
            tags = (repr(_tag(model)) for model in sections_of(section, name))
            says[key] = f"{key}.name must be {' or '.join(tags)}, found {found.get('name')!r}"
        else:
            word = WORDS.get(kind.partition("_")[0], message.removeprefix("Input should be "))
            # A key of two types has an error for each of them: a whole number or 'auto'.
            wanted[key] = f"{wanted[key]} or {word}" if key in wanted else word
            says[key] = f"{key} must be {wanted[key]}, found {found!r}"
    return "; ".join(says.values())


def _walk(location: Iterable[int | str], root: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted key at fault and its section; pydantic's way there also names the member of a
    union and the place inside a value."""
    keys: list[str] = []
    section, inner = root, [root]
    for part in location:
        if len(inner) > 1:
            inner = [model for model in inner if _tag(model) == part]
        elif inner:
            section = inner[0]
            keys.append(str(part))
            inner = sections_of(section, str(part))
    return ".".join(keys), section


def _leaves(section: type[BaseModel], prefix: str = "") -> set[str]:
    """The dotted keys of all plain values below a section, of every member of its unions."""
    found = set()
    for key in section.model_fields:
        inner = sections_of(section, key)
        for model in inner:
            found |= _leaves(model, f"{prefix}{key}.")
        if not inner:
            found.add(f"{prefix}{key}")
    return found


def sections_of(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The models that a key of a section may hold: none for a plain value, some for a union."""
    if key not in section.model_fields:
        return []
    annotation = section.model_fields[key].annotation
    options = get_args(annotation) or (annotation,)
    kinds = [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [each for kind in kinds for each in (kind.kinds() if hasattr(kind, "kinds") else [kind])]


def _tag(model: type[BaseModel]) -> str:
    return str(model.model_fields["name"].default)
