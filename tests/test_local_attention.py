"""local_attention="xformers" is refused wherever it cannot run, with the field, its value and the remedy."""

from importlib import metadata, util

import pytest

from vllm_infllm.ops.local_attention import refusal

HOPPER = (9, 0)


def install(patch: pytest.MonkeyPatch, version: str | None, flash_attn_3: bool = True) -> None:
    """Make it look as if this xformers, or none, were installed."""

    def version_of(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    patch.setattr(metadata, "version", version_of)
    patch.setattr(util, "find_spec", lambda name: object() if flash_attn_3 else None)


@pytest.mark.parametrize(
    ("operations", "dtype", "capability", "words"),
    [
        ("cpu", "bfloat16", None, ["ops='triton'", "'cpu'"]),
        ("reference", "bfloat16", HOPPER, ["ops='triton'", "'reference'"]),
        ("triton", "bfloat16", None, ["a GPU", "CPU platform"]),
        ("triton", "bfloat16", (7, 5), ["8.0 to 9.0", "has 7.5"]),
        ("triton", "bfloat16", (10, 0), ["8.0 to 9.0", "has 10.0"]),
        ("triton", "float32", HOPPER, ["float16 or bfloat16", "in float32", "--dtype"]),
    ],
)
def test_where_it_cannot_run(
    operations: str,
    dtype: str,
    capability: tuple[int, int] | None,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "0.0.35")
    assert_says(refusal(operations, dtype, capability), words)


@pytest.mark.parametrize(
    ("version", "flash_attn_3", "words"),
    [
        (None, True, ["xformers 0.0.35, which is not installed", "pip install --no-deps xformers==0.0.35"]),
        ("0.0.34", True, ["xformers 0.0.35, and 0.0.34 is installed", "pip install --no-deps xformers==0.0.35"]),
        ("0.0.35", False, ["flash_attn_3", "not installed"]),
    ],
)
def test_what_is_missing_is_named(
    version: str | None, flash_attn_3: bool, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version, flash_attn_3)
    assert_says(refusal("triton", "bfloat16", HOPPER), words)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), HOPPER])
def test_it_is_accepted_where_all_is_there(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "0.0.35")
    assert refusal("triton", "float16", capability) is None


def assert_says(reason: str | None, words: list[str]) -> None:
    assert reason is not None
    for word in ("local_attention='xformers'", "remove it", *words):
        assert word in reason
