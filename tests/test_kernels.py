"""Commands keep few compiled kernels, unless the environment says otherwise."""

from __future__ import annotations

import os

import pytest

from dseqjepa import cli, kernels


def test_a_command_bounds_what_is_kept_and_leaves_what_was_said(monkeypatch: pytest.MonkeyPatch):
    bounded, said = kernels.CACHES
    monkeypatch.setenv(bounded, "gone")
    monkeypatch.delenv(bounded)
    monkeypatch.setenv(said, "7")
    monkeypatch.setattr("sys.argv", ["dseqjepa", "presets"])
    cli.main()
    assert os.environ[bounded] == "128"
    assert os.environ[said] == "7"
