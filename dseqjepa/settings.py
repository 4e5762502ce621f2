"""Parse settings from YAML and `section.key=value`, and explain validation errors in one line.

`config.py` defines which settings are valid; this module handles the text around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dseqjepa.errors import InputError, did_you_mean, nearest

MOST_TEXT = 2**20
"""Maximum number of characters in a config file."""
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "model": "a section, whose keys are set one by one",
}
"""pydantic's error types by their first word -> what was expected."""
OF_LISTS = ("tuple", "missing", "too")
"""Those of which the field's type says what was expected."""
COUNTS = {2: "two", 3: "three"}


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, read as plain data; `InputError` for anything else."""
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
    """YAML without aliases, a few lines of which can expand to more values than fit in memory, and
    without dates, which no setting is."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the parent's
        first: [(tag, how) for tag, how in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"write the value in place of *{event.anchor}{event.start_mark}")
        return super().compose_node(parent, index)


def _plain(text: str) -> Any:
    """The values of a YAML text; `yaml.YAMLError` if it is invalid."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nesting is too deep") from None
    except ValueError as error:  # such as a date that does not exist
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`, whose value is YAML, to nested values."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"expected section.key=value, found {override!r}")
    # A path is taken literally: a folder may be called 2023, or no.
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
        for size in ("width", "depth", "heads"):  # these belong to the previous name
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
    """Every error in one line: each key, what it must be, and what was found."""
    says: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for item in error.errors():
        key, section = _walk(item["loc"], root)
        name = key.rpartition(".")[2]
        kind, message, found = item["type"], item["msg"], item["input"]
        if kind in ("extra_forbidden", "invalid_key"):
            elsewhere = sorted(k for k in _leaves(root) if k.rpartition(".")[2] == name)
            hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
            section_of = key.removesuffix(name)
            hint = hint or did_you_mean(name, section.model_fields, prefix=section_of)
            says[key] = f"unknown key {key!r}{hint}"
        elif kind == "value_error":
            message = message.removeprefix("Value error, ")
            says[key] = message if key in message else f"{key}: {message}"
        elif kind == "missing" and isinstance(item["loc"][-1], str):
            says[key] = f"{key} is missing"
        elif kind.startswith("union_tag"):
            tags = (repr(_tag(model)) for model in sections_of(section, name))
            says[key] = f"{key}.name must be {' or '.join(tags)}, found {found.get('name')!r}"
        else:
            first = kind.partition("_")[0]
            word = WORDS.get(first, message.removeprefix("Input should be "))
            if first in OF_LISTS:
                word = _in_brackets(section, name) or word
            # A key of two types has one error per type: a whole number or 'auto'.
            wanted[key] = f"{wanted[key]} or {word}" if key in wanted else word
            near = ""
            if kind == "literal_error" and isinstance(found, str):
                near = nearest(found, re.findall("'(.+?)'", item["ctx"]["expected"]), cutoff=0.6)
            says[key] = f"{key} must be {wanted[key]}, found {found!r}{near}"
    return "; ".join(says.values())


def _in_brackets(section: type[BaseModel], name: str) -> str | None:
    """What a field with a list must be, such as `two numbers in brackets`; None for any other."""
    field = section.model_fields.get(name)
    kinds = [field.annotation] if field is not None else []
    while kinds and get_origin(kinds[0]) is not tuple:
        kinds = [*get_args(kinds[0]), *kinds[1:]]
    if not kinds:
        return None
    first, *rest = get_args(kinds[0])
    if get_origin(first) is Annotated:
        first = get_args(first)[0]
    what = "number" if first in (int, float) else "word"
    if rest != [...]:
        return f"{COUNTS[len(rest) + 1]} {what}s in brackets"
    least = [getattr(each, "min_length", 0) for each in section.model_fields[name].metadata]
    return f"{'one or more ' if any(least) else ''}{what}s in brackets"


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
    """The dotted keys of all plain values below a section, over all members of its unions."""
    found = set()
    for key in section.model_fields:
        inner = sections_of(section, key)
        for model in inner:
            found |= _leaves(model, f"{prefix}{key}.")
        if not inner:
            found.add(f"{prefix}{key}")
    return found


def sections_of(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The models that a key of a section may hold: none for a plain value, several for a union."""
    if key not in section.model_fields:
        return []
    annotation = section.model_fields[key].annotation
    options = get_args(annotation) or (annotation,)
    kinds = [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [each for kind in kinds for each in (kind.kinds() if hasattr(kind, "kinds") else [kind])]


def _tag(model: type[BaseModel]) -> str:
    return str(model.model_fields["name"].default)
