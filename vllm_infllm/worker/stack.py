"""Room on the stack of Python's frames for the calls of a whole step.

Python takes that stack from the system in pieces of 16 KiB, and gives a piece back when the first frame in it ends.
Where a loop's calls happen to cross the end of a piece, each of them maps and unmaps memory. The kernel then interrupts
every core on which the process has a running thread: with both threads of a worker at work, attention layers that did
so took a fifth of the time of a token.
"""

from collections.abc import Callable
from types import FunctionType
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])

POINTERS = 1 << 13
"""What a function claims as stack of its own, 64 KiB. Python rounds up to a piece of 128 KiB; what is left is for the
frames that follow: 15 KiB down to the attention of a compiled model of 30 layers, two thirds of it growing with their
number."""


def with_stack_room(function: Function) -> Function:
    """`function`, in whose calls frames have a piece of the stack to themselves."""
    plain = cast(FunctionType, function)
    plain.__code__ = plain.__code__.replace(co_stacksize=POINTERS)
    return function
