"""Settings of the whole test run, which must precede the first import of torch and vLLM, and shared fixtures."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# A shell lets a job in the background ignore SIGINT, and with it all that the job starts. Tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a test that fails once fails again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Another build of the C++ operations to test: emulated instructions, sanitizers (see the Makefile).
if extension := os.environ.get("INFLLM_TEST_EXTENSION"):
    import torch  # noqa: F401  its libraries must be loaded first

    spec = importlib.util.spec_from_file_location("vllm_infllm._cpu", extension)
    assert spec and spec.loader
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


@pytest.fixture(scope="session")
def llama_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama whose words are its tokens; for all tests, so that none may write into it."""
    from tests import tiny_models

    folder = tmp_path_factory.mktemp("llama_with_tokenizer")
    tiny_models.add_tokenizer(folder)
    return tiny_models.make("llama", folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests whose tensors are tiny: on a busy machine, waiting for a second thread costs several times the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
