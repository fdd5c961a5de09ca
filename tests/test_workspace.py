"""Tensors that operations keep from call to call."""

from collections.abc import Iterator

import pytest
import torch

from vllm_infllm.ops import workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has buffers of its own."""
    monkeypatch.setattr(workspace, "_buffers", {})
    yield


def take(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return workspace.take(name, shape, dtype, CPU)


def test_what_inference_mode_made_can_be_written_outside_of_it() -> None:
    """vLLM runs in inference mode, warm-up and tests may not: a tensor made inside would refuse."""
    with torch.inference_mode():
        take("scores", 2, 3).fill_(1)
    outside = take("scores", 2, 3)
    assert not outside.is_inference()
    outside.fill_(2)
    with torch.inference_mode():
        assert take("scores", 2, 3).add_(1).tolist() == [[3.0] * 3] * 2


def test_a_buffer_grows_only_when_it_is_too_small() -> None:
    """The address stays as long as the memory suffices: also for less, and for another shape of as much."""
    first = take("scores", 4, 6)
    for shape in [(4, 6), (2, 3), (24,), (3, 8), (0, 5)]:
        again = take("scores", *shape)
        assert again.data_ptr() == first.data_ptr() or again.numel() == 0
        assert tuple(again.shape) == shape and again.is_contiguous()
    larger = take("scores", 5, 5)
    assert larger.data_ptr() != first.data_ptr()
    assert take("scores", 4, 6).data_ptr() == larger.data_ptr()


def test_names_types_and_devices_are_separate() -> None:
    """What is written under one name does not show under another, nor as another type."""
    one, other = take("scores", 8).fill_(1), take("mass", 8).fill_(2)
    whole = take("scores", 8, dtype=torch.int64).fill_(3)
    assert one.tolist() == [1.0] * 8 and other.tolist() == [2.0] * 8 and whole.tolist() == [3] * 8
    assert workspace.take("scores", (8,), torch.float32, torch.device("meta")).device.type == "meta"
    assert take("scores", 8).data_ptr() == one.data_ptr()


def test_the_same_name_shares_memory() -> None:
    """A caller that keeps a tensor across calls sees it change: that is the contract."""
    kept = take("scores", 4).fill_(1)
    take("scores", 4).fill_(2)
    assert kept.tolist() == [2.0] * 4
