"""Huge pages for large tensors in host memory.

Attention reads blocks that lie scattered over gigabytes. With pages of 4 KiB each block costs several address
translations and breaks the hardware's prefetching; with 2 MiB, decoding reads up to a quarter faster. All of this is
advice to the kernel: where it knows no such pages, everything works as without.
"""

import contextlib
import ctypes
import math
import mmap

import torch

MADV_COLLAPSE = 25
"""Linux 6.1; not in Python's mmap module."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized host tensor in huge pages. Reserves address space; nothing is touched before it is used."""
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def collapse(tensor: torch.Tensor) -> None:
    """Bring a host tensor that is in use already into huge pages, if the kernel can."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last <= first:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE):
        madvise(first, last - first, advice)  # a kernel that cannot says so in the result, and nothing has changed
