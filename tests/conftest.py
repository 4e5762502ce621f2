"""Run every test on one thread, and check array types and shapes at every call of `dseqjepa`."""

from __future__ import annotations

import ast
from typing import Any, Self

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import _import_hook

check_arrays = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int is a float, as it is to mypy
        # `Self` means nothing where a function is seen without its class.
        hint_overrides=FrozenDict({Self: Any}),
    )
)


SCALARS = {"bool", "dict", "float", "int", "list", "str", "tuple", "Iterable", "Sequence"}


class Arrays(_import_hook.JaxtypingTransformer):
    """Checks what mypy cannot, shapes, and only where that is cheap; all else made whole tests ten
    times slower. Functions and classes of nothing but scalars stay as they are, and so do functions
    inside functions, whose checks would be compiled anew at every call of the outer one."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        every = [part for part in ast.walk(node.args) if isinstance(part, ast.arg)]
        hints = [node.returns, *(argument.annotation for argument in every)]
        is_inner = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        return node if is_inner or _are_scalars(hints) else super().visit_FunctionDef(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        hints = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        if not _are_scalars(hints):
            return super().visit_ClassDef(node)
        self.generic_visit(node)
        return node


def _are_scalars(hints: list[ast.expr | None]) -> bool:
    names = {
        part.id
        for hint in hints
        if hint is not None
        for part in ast.walk(hint)
        if isinstance(part, ast.Name)
    }
    return all(name in SCALARS or name.startswith("_") for name in names)


_import_hook.JaxtypingTransformer = Arrays
# What is instrumented is cached by the name of its checker: this one is named after the class.
jaxtyping.install_import_hook("dseqjepa", "tests.conftest.check_arrays")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first: at the end, one process would run it and the other wait."""
    items.sort(key=lambda item: item.name != "test_every_printed_command_works")
