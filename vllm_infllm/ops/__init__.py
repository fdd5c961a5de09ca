"""Tensor operations of InfLLM: one interface (interface.py), several implementations."""

import importlib
from typing import Literal

from vllm_infllm.ops.interface import Ops

OpsName = Literal["cpu", "triton", "reference"]


def load(name: OpsName) -> Ops:
    """The implementation `name`, a module; raises ConfigError if it cannot be used on this machine."""
    ops: Ops = importlib.import_module(f"{__name__}.{name}")
    return ops
