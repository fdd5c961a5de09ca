"""Triton's interpreter, on CPU tensors, as its kernels need it."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("tests/gpu need TRITON_INTERPRET=1 before triton is imported: set it, or run them first")
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def _widen(x: TensorHandle) -> TensorHandle:
    """bfloat16, which the interpreter holds as uint16, in float32."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
    """The original multiplies the uint16."""
    return _dot(self, _widen(a), _widen(b), *others)


def _cast_impl(self: InterpreterBuilder, x: TensorHandle, to: tl.dtype) -> TensorHandle:
    """The original cuts float32 off to bfloat16; hardware rounds to the nearest, on a tie to the even one."""
    if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _cast(self, x, to)
    bits = x.data.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


InterpreterBuilder.create_dot = _create_dot
InterpreterBuilder.cast_impl = _cast_impl

# What follows more than halves the time.
_patch_lang, _patched = interpreter._patch_lang, set()


def _patch_once(fn: Callable[..., Any]) -> interpreter._LangPatchScope:
    """The original patches the language again in every call of every function, and restores it after a kernel."""
    modules = frozenset(name for name, value in fn.__globals__.items() if value is tl or value is tl.core)
    if modules not in _patched:
        _patch_lang(fn)
        _patched.add(modules)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
