"""Parsing of `key=value` arguments: a command's own settings, and those of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dseqjepa.errors import InputError


def as_options(command: Any, words: list[str]) -> list[str]:
    """The words of a command line, `name=value` written as `--name value` wherever the command
    that they name has such an option: both spellings are one.

    `command` is the whole program as `typer.main.get_command` gives it.
    """
    done: list[str] = []
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest[0]]
        done.append(rest.pop(0))
    valued = {
        option.removeprefix("--").replace("-", "_"): option
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_flag
        for option in parameter.opts
    }
    for word in rest:
        key, equals, value = word.partition("=")
        done += [valued[key], value] if equals and key in valued else [word]
    return done


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
