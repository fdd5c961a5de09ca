"""What a user can write under "infllm" in --additional-config, and what they are told when it does not work."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_infllm.config import ConfigError, InfLLMConfig, explain_shrinking, resolve

PLENTY = 32768
"""A trained length that no default is shrunk for."""


def refusal(user: Any, block_size: int = 128, trained_len: int = PLENTY) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        resolve(user, block_size, trained_len)
    return str(error.value)


def span(config: InfLLMConfig) -> int:
    """Tokens that the model must have been trained for."""
    return config.n_init + config.n_local + config.block_size + config.exc_block_size


# --- What is accepted ------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    """An empty configuration on a model trained long enough is the paper's, section 4.1."""
    config = resolve({}, 128, PLENTY)
    assert (config.n_init, config.n_local, config.topk, config.repr_topk) == (128, 4096, 16, 4)
    assert (config.exc_block_size, config.block_size) == (512, 128)


def test_what_the_user_gives_is_used() -> None:
    """Every field that is given and fits arrives as it was given."""
    given = {
        "n_init": 64,
        "n_local": 1024,
        "topk": 8,
        "repr_topk": 2,
        "selection": "peak",
        "exc_block_size": 256,
        "max_cached_blocks": 32,
        "cache_strategy": "lru-s",
        "score_decay": 0.5,
        "host_memory_gib": 3.5,
        "ops": "reference",
        "local_attention": "xformers",
    }
    assert resolve(given, 64, PLENTY).model_dump() == {**given, "block_size": 64}


def test_topk_zero_is_allowed() -> None:
    """topk 0 means window and initial tokens only."""
    assert resolve({"topk": 0}, 128, PLENTY).topk == 0


def test_n_init_zero_is_allowed() -> None:
    """n_init 0 is a multiple of every block size: no token is always visible."""
    assert resolve({"n_init": 0}, 128, PLENTY).geometry.init_blocks == 0


def test_exc_block_size_may_equal_n_local() -> None:
    """The largest execution block is the window."""
    assert resolve({"n_local": 512, "exc_block_size": 512}, 128, PLENTY).exc_block_size == 512


def test_repr_topk_may_equal_the_block_size() -> None:
    """Every token of a unit may represent it."""
    assert resolve({"repr_topk": 16}, 16, PLENTY).repr_topk == 16


def test_whole_number_of_gib_is_a_size() -> None:
    """`"host_memory_gib": 4` is as good as 4.0."""
    assert resolve({"host_memory_gib": 4}, 128, PLENTY).host_memory_gib == 4.0


def test_effective_configuration_survives_the_trip_to_the_workers() -> None:
    """What travels in additional_config as a plain dict builds the same configuration again."""
    config = resolve({"topk": 8, "host_memory_gib": 2.5}, 64, PLENTY)
    assert InfLLMConfig(**config.model_dump()) == config


# --- Keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("top_k", "topk"),
        ("n_locl", "n_local"),
        ("N_INIT", None),
        ("exec_block_size", "exc_block_size"),
        ("host_memory_gb", "host_memory_gib"),
        ("cache_stratgy", "cache_strategy"),
        ("zzz", None),
    ],
)
def test_mistyped_key_names_itself_and_what_was_meant(key: str, meant: str | None) -> None:
    """An unknown key is refused with its name and value, the nearest known key if one is near, and all known keys."""
    message = refusal({key: 7})
    assert f"{key}=7" in message
    if meant:
        assert f'Did you mean "{meant}"?' in message
    else:
        assert "Did you mean" not in message
    for known in ("n_init", "n_local", "topk", "repr_topk", "exc_block_size", "host_memory_gib", "score_decay"):
        assert known in message


def test_block_size_is_vllms_flag() -> None:
    """The unit size is not a key: the message names the value given and the flag to use."""
    message = refusal({"block_size": 64})
    assert "block_size=64" in message and "--block-size" in message


def test_wrong_key_is_named_among_right_ones() -> None:
    """The first unknown key is the one refused, whatever stands beside it."""
    assert "topkk=3" in refusal({"topk": 3, "topkk": 3})


@pytest.mark.parametrize("value", [None, 16, "topk=8", ["topk", 8], True])
def test_only_an_object_is_a_configuration(value: Any) -> None:
    """Anything but a JSON object is refused, with the value and an example of what is meant."""
    message = refusal(value)
    assert repr(value) in message and '{"topk": 16}' in message and "--additional-config" in message


# --- Types and ranges ------------------------------------------------------------------------------------------------

SIZES = ["n_init", "n_local", "topk", "repr_topk", "exc_block_size"]
NO_SIZES: list[Any] = ["128", 128.0, 128.5, True, [128], {}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product([*SIZES, "max_cached_blocks"], NO_SIZES),
        *((field, None) for field in SIZES),
    ],
)
def test_sizes_are_integers(field: str, value: Any) -> None:
    """A string, a float (even a whole one), a boolean or null is no size; the message says an integer is wanted.

    But null is allowed where what is not given depends on the platform.
    """
    message = refusal({field: value})
    assert f"{field}={value!r}" in message and "integer" in message and "--additional-config" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("topk", -1),
        ("n_init", -128),
        ("n_local", 0),
        ("n_local", -128),
        ("repr_topk", 0),
        ("exc_block_size", 0),
        ("exc_block_size", -1),
        ("max_cached_blocks", -1),
        ("host_memory_gib", 0),
        ("host_memory_gib", -2.5),
        ("score_decay", 0),
        ("score_decay", 1.01),
    ],
)
def test_out_of_range_is_refused(field: str, value: float) -> None:
    """The message names field and value, and the limit that it breaks."""
    message = refusal({field: value})
    assert f"{field}={value!r}" in message and ("greater than" in message or "less than" in message)


@pytest.mark.parametrize("field", ["host_memory_gib", "score_decay"])
@pytest.mark.parametrize("value", ["4", True, [4.0]])
def test_fractions_are_numbers(field: str, value: Any) -> None:
    """A string, a boolean or a list is no number."""
    message = refusal({field: value})
    assert f"{field}={value!r}" in message and "number" in message


@pytest.mark.parametrize("field", ["host_memory_gib", "score_decay"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinity_and_nan_are_no_sizes(field: str, value: float) -> None:
    """Python's JSON reads Infinity and NaN; both are refused here, not where they are first computed with."""
    assert f"{field}={value!r}" in refusal({field: value})


@pytest.mark.parametrize("value", ["LRU", "mru", 1, None])
def test_cache_strategies_are_listed(value: Any) -> None:
    """An unknown strategy is refused with the three there are."""
    message = refusal({"cache_strategy": value})
    assert f"cache_strategy={value!r}" in message
    for known in ("lru", "fifo", "lru-s"):
        assert f"'{known}'" in message


@pytest.mark.parametrize("value", ["CPU", "cuda", 1, ""])
def test_implementations_of_the_ops_are_listed(value: Any) -> None:
    """An unknown implementation is refused with those there are."""
    message = refusal({"ops": value})
    assert f"ops={value!r}" in message and all(f"'{known}'" in message for known in ("cpu", "triton", "reference"))


# --- Sizes that must fit each other ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "block_size", "remedy"),
    [
        ("n_init", 100, 128, "use 128"),
        ("n_init", 200, 128, "use 128"),
        ("n_local", 1000, 128, "use 896"),
        ("n_local", 4097, 16, "use 4096"),
        ("n_local", 64, 128, "use 128"),
    ],
)
def test_sizes_that_do_not_divide(field: str, value: int, block_size: int, remedy: str) -> None:
    """n_init and n_local must be multiples of the block size; the message proposes one, or another --block-size."""
    message = refusal({field: value, "exc_block_size": 16}, block_size)
    assert f"{field}={value}" in message and f"--block-size {block_size}" in message and remedy in message


def test_exc_block_size_above_n_local() -> None:
    """Both sizes are in the message, and the two ways out."""
    message = refusal({"n_local": 512, "exc_block_size": 513})
    assert "exc_block_size=513" in message and "n_local 512" in message
    assert "lower exc_block_size" in message and "raise n_local" in message


def test_repr_topk_above_the_block_size() -> None:
    """A unit has no more tokens than its size."""
    message = refusal({"repr_topk": 17}, block_size=16)
    assert "repr_topk=17" in message and "--block-size 16" in message and "lower repr_topk" in message


def test_fewer_slots_than_units_retrieved() -> None:
    """The units of one retrieval must be resident together; 0 slots are the other way out."""
    message = refusal({"topk": 8, "max_cached_blocks": 7})
    assert "max_cached_blocks=7" in message and "topk 8" in message and "raise it" in message and "set 0" in message
    assert resolve({"topk": 8, "max_cached_blocks": 8}, 128, PLENTY).max_cached_blocks == 8
    assert resolve({"topk": 8, "max_cached_blocks": 0}, 128, PLENTY).max_cached_blocks == 0


@pytest.mark.parametrize(
    ("slots", "n_init", "kept"), [(0, 128, 1), (0, 0, 1), (16, 128, 17), (16, 0, 16), (20, 384, 23)]
)
def test_kept_blocks_are_the_slots(slots: int, n_init: int, kept: int) -> None:
    """A request keeps one block for its name, or as many as its slots: initial blocks and cached units."""
    assert resolve({"max_cached_blocks": slots, "n_init": n_init}, 128, PLENTY).kept_blocks == kept


# --- Trained length --------------------------------------------------------------------------------------------------


def test_explicit_window_that_does_not_fit() -> None:
    """A given n_local is never shrunk: the message adds up the sizes and names the trained length."""
    message = refusal({"n_local": 8192}, trained_len=8192)
    assert "n_local=8192" in message and "8960" in message and "8192 that the model was trained for" in message
    assert "lower n_local" in message


def test_explicit_exc_block_size_that_does_not_fit() -> None:
    """A given exc_block_size larger than any window that fits is refused by its own name."""
    message = refusal({"exc_block_size": 1800}, trained_len=2048)
    assert "exc_block_size=1800" in message and "lower exc_block_size" in message


def test_explicit_n_init_that_does_not_fit() -> None:
    """A given n_init that leaves no room for a window is refused by its own name: lowering it is the remedy."""
    message = refusal({"n_init": 2048}, trained_len=2048)
    assert "n_init=2048" in message and "lower n_init" in message


def test_model_trained_too_short_for_one_block() -> None:
    """When not even the smallest window fits, --block-size is the remedy, named with its value."""
    message = refusal({}, block_size=128, trained_len=256)
    assert "--block-size 128" in message and "256 that the model was trained for" in message
    assert "--block-size." in message


def test_block_size_above_every_default() -> None:
    """With units larger than the default window, the block size is to blame, not a field that the user did not give."""
    message = refusal({}, block_size=8192, trained_len=1 << 20)
    assert "--block-size 8192" in message
    assert "n_init=128 is not a multiple" not in message and "n_init=8192 is not a multiple" not in message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([1, 3, 8, 16, 24, 32, 64, 100, 128, 256, 512]), st.integers(1, 12000))
def test_defaults_shrink_to_fit_any_trained_length(block_size: int, trained_len: int) -> None:
    """The defaults either fit and divide, with the largest window that does, or are refused."""
    try:
        config = resolve({"repr_topk": 1}, block_size, trained_len)
    except ConfigError:
        # Refused only if the smallest configuration, of one block for each size, does not fit either.
        n_init = -(-128 // block_size) * block_size
        assert n_init + block_size + block_size + min(512, block_size) > trained_len
        return
    assert span(config) <= trained_len
    assert config.n_init % block_size == 0 and config.n_local % block_size == 0
    assert config.exc_block_size <= config.n_local <= 4096
    assert config.n_init >= 128 and config.exc_block_size <= 512
    larger = config.n_local + block_size
    assert larger > 4096 or config.n_init + larger + block_size + min(512, larger) > trained_len


@settings(max_examples=500, deadline=None)
@given(
    block_size=st.sampled_from([8, 16, 64, 128]),
    trained_len=st.integers(64, 12000),
    given_sizes=st.fixed_dictionaries(
        {},
        optional={
            "n_init": st.integers(0, 40).map(lambda n: n * 8),
            "n_local": st.integers(1, 200).map(lambda n: n * 16),
            "exc_block_size": st.integers(1, 1024),
            "repr_topk": st.integers(1, 20),
            "topk": st.integers(0, 40),
        },
    ),
)
def test_given_values_are_kept_or_refused(block_size: int, trained_len: int, given_sizes: dict[str, int]) -> None:
    """Whatever is given, the result keeps it, fits the trained length and divides; otherwise startup stops."""
    try:
        config = resolve(given_sizes, block_size, trained_len)
    except ConfigError:
        return
    for name, value in given_sizes.items():
        assert getattr(config, name) == value
    assert span(config) <= trained_len
    assert config.n_init % block_size == 0 and config.n_local % block_size == 0
    assert config.exc_block_size <= config.n_local and config.repr_topk <= block_size


@settings(max_examples=300, deadline=None)
@given(
    block_size=st.sampled_from([16, 64, 128]),
    blocks=st.tuples(st.integers(0, 4), st.integers(1, 40)),
    exc=st.integers(1, 1024),
    slack=st.integers(0, 500),
)
def test_values_that_fit_are_accepted(block_size: int, blocks: tuple[int, int], exc: int, slack: int) -> None:
    """A complete configuration that divides is accepted if the model was trained for its span, and not below."""
    n_init, n_local = blocks[0] * block_size, blocks[1] * block_size
    assume(exc <= n_local)
    given_sizes = {"n_init": n_init, "n_local": n_local, "exc_block_size": exc}
    needed = n_init + n_local + block_size + exc
    assert span(resolve(given_sizes, block_size, needed + slack)) == needed
    refusal(given_sizes, block_size, needed - 1)


def test_shrinking_is_explained() -> None:
    """The startup line says from what to what each default was shrunk, and nothing of what was given or stayed."""
    user = {"exc_block_size": 256}
    config = resolve(user, 128, 2048)
    assert explain_shrinking(config, user) == "n_local 4096 -> 1536"
    assert explain_shrinking(resolve({}, 128, PLENTY), {}) == ""


def test_rounding_of_n_init_is_explained() -> None:
    """A default n_init that had to grow to a multiple of the block size is said, too."""
    config = resolve({}, 256, PLENTY)
    assert config.n_init == 256
    assert "n_init 128 -> 256" in explain_shrinking(config, {})
