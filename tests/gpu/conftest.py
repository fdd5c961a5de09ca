"""Where the kernels of the GPU path run: on the CPU (interpreter.py, cuda_shim.h), or on a GPU (on_device.py)."""

import os

import pytest

DEVICE = os.environ.get("INFLLM_TEST_DEVICE", "cpu")
"""cpu, or cuda: `make test-gpu`."""
OFFLINE_ONLY = {
    *("test_capture.py", "test_graph.py", "test_cuda_build.py", "test_machine_code.py"),
    *("test_end_to_end.py", "test_local_xformers.py"),
}
"""About compilers, the interpreter, fake tensors and the CPU platform."""

if DEVICE == "cpu":
    from tests.gpu import interpreter  # noqa: F401  before triton is imported
else:
    from tests.gpu import on_device

    on_device.move()


def pytest_ignore_collect(collection_path: os.PathLike[str]) -> bool | None:
    """Nothing to be seen on a GPU."""
    return True if DEVICE != "cpu" and os.path.basename(collection_path) in OFFLINE_ONLY else None


@pytest.fixture
def fake_tensors() -> None:
    if DEVICE != "cpu":
        pytest.skip("fake tensors are for machines without a GPU")
