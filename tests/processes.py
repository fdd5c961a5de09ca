"""An engine core and its worker without vLLM, whose import takes seconds: what test_stopping.py starts."""

import multiprocessing
import os
import time
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
