"""An engine core and its worker without vLLM, whose import takes seconds: what test_stopping.py starts."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from vllm_infllm import stopping


def worker(ready: Connection) -> None:
    """Deaf to everything, as one may be that is in the middle of a step on a busy machine."""
    stopping.end_with_engine_core()
    ready.send(os.getpid())
    time.sleep(600)


def engine_core(ready: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=worker, args=(ready,)).start()
    time.sleep(600)


class Garbage:
    """Refers to itself, so only Python's search for garbage finds it; calls `found` then."""

    def __init__(self, found: Callable[[], None]) -> None:
        self.found, self.itself = found, self

    def __del__(self) -> None:
        self.found()


def process_with_garbage(found: Connection) -> None:
    stopping.end_soon()
    Garbage(lambda: found.send("at the end"))
