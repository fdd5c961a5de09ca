"""Compiled extensions that are not the ones of this version."""

import sys
import types

import pytest

import vllm_infllm


def replace(monkeypatch: pytest.MonkeyPatch, ops: str, extension: types.ModuleType | None) -> None:
    """As if `extension` were installed for vllm_infllm.ops.`ops`, or none."""
    monkeypatch.delitem(sys.modules, f"vllm_infllm.ops.{ops}", raising=False)
    monkeypatch.delattr(vllm_infllm, f"_{ops}", raising=False)
    monkeypatch.setitem(sys.modules, f"vllm_infllm._{ops}", extension)  # type: ignore[arg-type]


def older(ops: str) -> types.ModuleType:
    extension = types.ModuleType(f"vllm_infllm._{ops}")
    extension.version = lambda: "0.0.1"  # type: ignore[attr-defined]
    return extension
