"""Parsing of `key=value` arguments: a command's own settings, and those of a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from dseqjepa.errors import InputError

TAKES_SETTINGS = ("settings", "words")
"""Names of arguments that hold `key=value` words."""


def as_options(command: Any, words: list[str]) -> list[str]:
    """The words of a command line, each in the spelling that its command declares.

    `name=value` and `--name value` (or `--name=value`) are the same: the former becomes the latter
    if the command has that option, and the latter the former if it has not and takes settings.
    `--name` without a value is `name=true`.

    `command` is the whole program, as returned by `typer.main.get_command`.
    """
    done: list[str] = []
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest[0]]
        done.append(rest.pop(0))
    options = {option: p for p in command.params for option in p.opts if option.startswith("--")}
    valued = {
        option[2:].replace("-", "_"): option
        for option, parameter in options.items()
        if not parameter.is_flag
    }
    takes_settings = any(parameter.name in TAKES_SETTINGS for parameter in command.params)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if equals and key in valued:
            done += [valued[key], value]
        elif word in valued.values():
            done += [word, *rest[:1]]
            del rest[:1]
        elif word.startswith("--") and key not in {"--", "--help", *options} and takes_settings:
            if not equals:
                is_value = rest and not rest[0].startswith("--") and "=" not in rest[0]
                value = rest.pop(0) if is_value else "true"
            done.append(f"{key[2:].replace('-', '_')}={value}")
        else:
            done.append(word)
    return done


def check_positions(command: Any, words: list[str]) -> None:
    """`InputError` if a setting is where the command expects something else, such as the preset
    that was left out in `pretrain data=my_pictures`."""
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    for parameter in command.params:
        if not (parameter.param_type_name == "argument" and parameter.required and rest):
            return
        word = rest.pop(0)
        if re.match(r"[a-z_]+(\.[a-z_]+)*=", word) and not Path(word).exists():
            what = parameter.metavar or parameter.name.upper()
            raise InputError(f"{what} is missing before {word!r} (--help shows the usage)")


def split_settings(settings: list[str], own: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Split arguments into a command's own `key=value` settings and those of the config."""
    mine: dict[str, str] = {}
    others = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            hint = f"; did you mean data={setting}?" if Path(setting).exists() else ""
            raise InputError(f"expected key=value, found {setting!r}{hint}")
        if key in own:
            if not value:
                raise InputError(f"{key}= is empty: give a value")
            if key in mine:
                raise InputError(f"{key} is given twice: {mine[key]!r} and {value!r}")
            mine[key] = value
        else:
            others.append(f"data.source={value}" if key == "data" else setting)
    return mine, others


def resume_of(run: dict[str, str]) -> bool | int | Literal["auto"]:
    """Whether to resume, or from which step; "auto": if there is something to resume."""
    value = run.get("resume", "")
    if value.lower() == "auto":
        return "auto"
    return int(value) if value.isdecimal() else flag(run, "resume", " or auto, or a step")


def row_and_column(text: str) -> tuple[int, int]:
    """Row and column from `3,4`, both counted from 0."""
    row, comma, column = text.partition(",")
    if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
        raise InputError(f"expected --patch ROW,COL, such as 3,4, found {text!r}")
    return int(row), int(column)


def flag(run: dict[str, str], key: str, beside: str = "") -> bool:
    """A command's own boolean setting, false by default. `beside` names other values it accepts."""
    value = run.get(key, "false").lower()
    if value not in ("true", "false"):
        raise InputError(f"{key} must be true or false{beside}, found {run[key]!r}")
    return value == "true"
