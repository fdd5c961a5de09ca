"""The rotary tables against the rope papers' definitions, computed in float64, and against vLLM's own rotation."""

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_infllm.attention.backend import InfLLMImpl
from vllm_infllm.attention.rope import RotaryTable, check_supported, extend
from vllm_infllm.config import ConfigError
from vllm_infllm.worker.base import bind_rope

N_LOCAL = 40
BASE = 10000.0

# Rope parameters as a model's config.json has them (transformers 5 spelling).
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": BASE},
    "linear": {"rope_type": "linear", "rope_theta": BASE, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": BASE, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_own_factor": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.4,
        "beta_fast": 8,
        "beta_slow": 2,
        "truncate": False,
    },
}
ALL_TYPES = pytest.mark.parametrize("rope_type", TYPES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
STYLES = pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
PARTIAL = pytest.mark.parametrize("partial", [1.0, 0.5], ids=["full", "partial"])
HEAD_SIZE = 32


@pytest.fixture(scope="module")
def vllm_config() -> VllmConfig:
    return VllmConfig()


@pytest.fixture(autouse=True)
def own_modules(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of this test's own: vLLM shares them between layers, and `extend` changes them."""
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    torch.manual_seed(0)
    with set_current_vllm_config(vllm_config):
        yield


def module(
    rope_type: str,
    dtype: torch.dtype = torch.float32,
    neox: bool = True,
    partial: float = 1.0,
    max_position: int = 256,
    head_size: int = HEAD_SIZE,
) -> torch.nn.Module:
    parameters = {**TYPES[rope_type], "partial_rotary_factor": partial}
    return get_rope(head_size, max_position, neox, parameters, dtype)


def table(rope: torch.nn.Module) -> RotaryTable:
    return RotaryTable(rope.cos_sin_cache.float(), rope.is_neox_style)


# --- The definitions, in float64 -------------------------------------------------------------------------------------


def plain_inverse_frequencies(base: float, rotary_dim: int) -> list[float]:
    """RoFormer (arXiv 2104.09864): theta_i = base^(-2i/d)."""
    return [base ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]


def llama3_inverse_frequency(theta: float, p: dict[str, Any]) -> float:
    """Llama 3.1: slow pairs are slowed down by `factor`, fast ones are kept, with a linear blend of both between."""
    rotations = p["original_max_position_embeddings"] * theta / (2 * math.pi)
    if rotations < p["low_freq_factor"]:
        return theta / p["factor"]
    if rotations > p["high_freq_factor"]:
        return theta
    kept = (rotations - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    return kept * theta + (1 - kept) * theta / p["factor"]


def yarn_inverse_frequencies(p: dict[str, Any], rotary_dim: int) -> list[float]:
    """YaRN (arXiv 2309.00071, "NTK-by-parts"), with the ramp over pair indices as in the authors' code.

    The pair that turns r times in the original length has the index d ln(L / (2 pi r)) / (2 ln base).
    """
    base, length = p["rope_theta"], p["original_max_position_embeddings"]

    def pair_turning(rotations: float) -> float:
        return rotary_dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(base))

    low, high = pair_turning(p.get("beta_fast", 32)), pair_turning(p.get("beta_slow", 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    frequencies = []
    for i, theta in enumerate(plain_inverse_frequencies(base, rotary_dim)):
        interpolated = min(1.0, max(0.0, (i - low) / (high - low)))
        frequencies.append(interpolated * theta / p["factor"] + (1 - interpolated) * theta)
    return frequencies


def definition(rope_type: str, rotary_dim: int, positions: Tensor) -> Tensor:
    """cos and sin [N, rotary_dim] of the rope type at `positions`, float64."""
    p = TYPES[rope_type]
    theta = plain_inverse_frequencies(p["rope_theta"], rotary_dim)
    attention_factor = 1.0
    if p["rope_type"] == "linear":
        theta = [t / p["factor"] for t in theta]
    elif p["rope_type"] == "llama3":
        theta = [llama3_inverse_frequency(t, p) for t in theta]
    elif p["rope_type"] == "yarn":
        theta = yarn_inverse_frequencies(p, rotary_dim)
        attention_factor = p.get("attention_factor", 0.1 * math.log(p["factor"]) + 1)
    angles = positions[:, None].double() * torch.tensor(theta, dtype=torch.float64)
    return attention_factor * torch.cat([angles.cos(), angles.sin()], dim=-1)


def rounding(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What float32 angles and the table's dtype may cost at each position [N, 1]."""
    return 4e-7 * (1 + positions[:, None].double()) + 1.5 * torch.finfo(dtype).eps


# --- Extension -------------------------------------------------------------------------------------------------------


@ALL_TYPES
@DTYPES
@PARTIAL
def test_new_rows_are_the_definition(rope_type: str, dtype: torch.dtype, partial: float) -> None:
    """The rows that extension adds are the papers' formulas, up to float32 angles and the table's rounding."""
    rope = module(rope_type, dtype, partial=partial)
    old_len = rope.cos_sin_cache.shape[0]
    extend(rope, 3000)
    new = torch.arange(old_len, 3000)
    assert rope.cos_sin_cache.shape == (3000, int(HEAD_SIZE * partial)) and rope.cos_sin_cache.dtype == dtype
    error = (rope.cos_sin_cache[new].double() - definition(rope_type, int(HEAD_SIZE * partial), new)).abs()
    assert (error <= rounding(new, dtype)).all()


@ALL_TYPES
def test_types_differ_by_more_than_rounding(rope_type: str) -> None:
    """The tolerance of the test above tells the rope types apart: no type's rows pass for those of another."""
    rope = module(rope_type)
    extend(rope, 3000)
    new = torch.arange(2000, 3000)
    for other in TYPES:
        error = (rope.cos_sin_cache[new].double() - definition(other, HEAD_SIZE, new)).abs()
        assert bool((error <= rounding(new, torch.float32)).all()) == (other == rope_type)


@ALL_TYPES
@DTYPES
@pytest.mark.parametrize(("max_position", "head_size"), [(256, 64), (37, 6), (1001, 10)])
def test_old_rows_stay_bit_equal(rope_type: str, dtype: torch.dtype, max_position: int, head_size: int) -> None:
    """Short inputs see the very table that stock vLLM uses, also at sizes that no vector width divides."""
    rope = module(rope_type, dtype, max_position=max_position, head_size=head_size)
    old = rope.cos_sin_cache.clone()
    extend(rope, 4 * len(old) + 3)
    assert len(rope.cos_sin_cache) == 4 * len(old) + 3
    assert torch.equal(rope.cos_sin_cache[: len(old)], old)


@ALL_TYPES
def test_extension_is_what_a_longer_model_would_have(rope_type: str) -> None:
    """vLLM's own rotation by the extended table at a far position is the definition's rotation there."""
    rope = module(rope_type)
    extend(rope, 2000)
    q = torch.randn(1, HEAD_SIZE)
    rotated, _ = rope.forward_native(torch.tensor([1999]), q.clone())
    cos, sin = definition(rope_type, HEAD_SIZE, torch.tensor([1999])).chunk(2, dim=-1)
    first, second = q.double().chunk(2, dim=-1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=4e-3)


def test_long_enough_table_is_left_alone() -> None:
    """Nothing is computed or replaced when the table already reaches max_model_len."""
    rope = module("default")
    old = rope.cos_sin_cache
    extend(rope, len(old))
    extend(rope, 10)
    assert rope.cos_sin_cache is old


def test_extended_table_moves_with_the_module() -> None:
    """The extended table is the module's buffer still, so that moving the module moves it."""
    rope = module("yarn")
    extend(rope, 2000)
    assert dict(rope.named_buffers())["cos_sin_cache"].shape[0] == 2000


# --- Rotation, inverse rotation --------------------------------------------------------------------------------------


def rotated_by_vllm(rope: torch.nn.Module, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's rotation of [N, heads, D] tensors, in float32, by the module's table as it is rounded."""
    return rope.forward_static(
        positions,
        query,
        key,
        rope.head_size,
        rope.rotary_dim,
        rope.cos_sin_cache.float(),
        rope.is_neox_style,
    )


@ALL_TYPES
@DTYPES
@STYLES
@PARTIAL
def test_rotate_is_vllms(rope_type: str, dtype: torch.dtype, neox: bool, partial: float) -> None:
    """`rotate` does what the model's rotary module does."""
    rope = module(rope_type, dtype, neox, partial)
    x, positions = torch.randn(50, 3, HEAD_SIZE), torch.randint(0, 256, (50,))
    expected, _ = rotated_by_vllm(rope, positions, x, x)
    torch.testing.assert_close(table(rope).rotate(x, positions), expected, rtol=0, atol=1e-6)


@ALL_TYPES
@DTYPES
@STYLES
@PARTIAL
def test_unrotate_inverts_vllms_rotation(rope_type: str, dtype: torch.dtype, neox: bool, partial: float) -> None:
    """Un-rotated keys are the raw keys to 1e-6, also by tables rounded to bf16 or carrying an attention factor."""
    rope = module(rope_type, dtype, neox, partial)
    extend(rope, 3000)
    raw, positions = torch.rand(400, 2, HEAD_SIZE) * 2 - 1, torch.randint(0, 3000, (400,))
    rotated, _ = rotated_by_vllm(rope, positions, raw, raw)
    torch.testing.assert_close(table(rope).unrotate(rotated, positions), raw, rtol=0, atol=1e-6)


def test_unrotate_reads_low_precision_keys_in_float32() -> None:
    """Keys come back in float32 and lose no more than their own rounding in the cache."""
    rope = module("yarn", torch.bfloat16)
    raw, positions = torch.rand(100, 2, HEAD_SIZE) * 2 - 1, torch.randint(0, 256, (100,))
    rotated, _ = rotated_by_vllm(rope, positions, raw, raw)
    back = table(rope).unrotate(rotated.bfloat16(), positions)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, raw, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps)


# --- Far rotation ----------------------------------------------------------------------------------------------------


@ALL_TYPES
@DTYPES
@STYLES
@PARTIAL
def test_far_is_the_distance_n_local_minus_one(rope_type: str, dtype: torch.dtype, neox: bool, partial: float) -> None:
    """A far query with a raw key scores as the module's query at n_local - 1 with the module's key at position 0."""
    rope = module(rope_type, dtype, neox, partial)
    extend(rope, 3000)
    count = 60
    query, key = torch.randn(count, 4, HEAD_SIZE), torch.randn(count, 4, HEAD_SIZE)
    positions = torch.randint(0, 3000, (count,))

    expected_query, _ = rotated_by_vllm(rope, torch.full((count,), N_LOCAL - 1), query, query)
    expected_key, _ = rotated_by_vllm(rope, torch.zeros(count, dtype=torch.int64), key, key)
    expected = torch.einsum("nhd,mhd->hnm", expected_query, expected_key)

    cached_query, _ = rotated_by_vllm(rope, positions, query, query)
    far = table(rope).far(cached_query, positions, N_LOCAL)
    torch.testing.assert_close(torch.einsum("nhd,mhd->hnm", far, key), expected, rtol=0, atol=2e-5)


@ALL_TYPES
def test_far_does_not_depend_on_the_position(rope_type: str) -> None:
    """The same raw query is the same far query wherever it stands."""
    rope = module(rope_type)
    extend(rope, 3000)
    positions = torch.tensor([0, 1, N_LOCAL - 1, N_LOCAL, 255, 2999])
    query = torch.randn(1, 2, HEAD_SIZE).expand(len(positions), -1, -1)
    far = table(rope).far(table(rope).rotate(query, positions), positions, N_LOCAL)
    torch.testing.assert_close(far, far[:1].expand_as(far), rtol=0, atol=2e-6)


def test_far_leaves_its_argument_alone() -> None:
    """The query is used again for the local part: it must not be rotated in place."""
    query, positions = torch.randn(5, 2, HEAD_SIZE), torch.arange(5)
    before = query.clone()
    table(module("yarn")).far(query, positions, N_LOCAL)
    assert torch.equal(query, before)


# --- What is refused -------------------------------------------------------------------------------------------------

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "DynamicNTKScalingRotaryEmbedding": {"rope_type": "dynamic", "factor": 2.0},
    "DynamicNTKAlphaRotaryEmbedding": {"rope_type": "dynamic", "alpha": 2.0},
    "NTKScalingRotaryEmbedding": {"rope_type": "ntk", "factor": 2.0},
    "MRotaryEmbedding": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    "Phi3LongRoPEScaledRotaryEmbedding": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (HEAD_SIZE // 2),
        "long_factor": [2.0] * (HEAD_SIZE // 2),
        "original_max_position_embeddings": 64,
    },
}


def unsupported_module(name: str, vllm_config: VllmConfig) -> torch.nn.Module:
    with_model = copy.copy(vllm_config)
    with_model.model_config = SimpleNamespace(max_model_len=128)  # LongRoPE asks for it
    with set_current_vllm_config(with_model):
        return get_rope(HEAD_SIZE, 128, True, UNSUPPORTED[name], torch.float32)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_types_are_refused_by_name(name: str, vllm_config: VllmConfig) -> None:
    """A rope whose angles depend on more than one position or on the length stops startup; the message names it."""
    rope = unsupported_module(name, vllm_config)
    with pytest.raises(ConfigError, match=f"rope type {name}") as error:
        check_supported(rope)
    assert "--attention-backend infllm" in str(error.value) and "YaRNScalingRotaryEmbedding" in str(error.value)


@ALL_TYPES
def test_supported_types_pass(rope_type: str) -> None:
    """No supported type is refused."""
    check_supported(module(rope_type))


@pytest.mark.parametrize("name", [name for name in UNSUPPORTED if name != "Phi3LongRoPEScaledRotaryEmbedding"])
def test_extending_another_type_is_a_configuration_error(name: str, vllm_config: VllmConfig) -> None:
    """Every rotary module of the model is extended, of other layers, too: one that cannot be says so by its name."""
    with pytest.raises(ConfigError, match=name) as error:
        extend(unsupported_module(name, vllm_config), 3000)
    assert "--max-model-len" in str(error.value) or "--attention-backend infllm" in str(error.value)


class OneLayer(torch.nn.Module):
    """A model of one attention layer, with the names that models in vLLM have."""

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.self_attn = torch.nn.Module()
        self.self_attn.rotary_emb = rope
        self.self_attn.attn = torch.nn.Module()
        self.self_attn.attn.impl = object.__new__(InfLLMImpl)

    def bind(self, max_model_len: int) -> InfLLMImpl:
        layers = {"self_attn.attn": self.self_attn.attn}
        bind_rope(
            self,
            SimpleNamespace(  # type: ignore[arg-type]
                model_config=SimpleNamespace(max_model_len=max_model_len),
                compilation_config=SimpleNamespace(static_forward_context=layers),
            ),
        )
        return self.self_attn.attn.impl


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_model_with_another_type_is_refused_by_name(name: str, vllm_config: VllmConfig) -> None:
    """When a loaded model's layer has such a rope, the message that stops startup names the type."""
    with pytest.raises(ConfigError, match=name):
        OneLayer(unsupported_module(name, vllm_config)).bind(3000)


def test_layers_get_the_extended_table() -> None:
    """After loading, a layer's memory and the model's own rotation read the same, extended table."""
    rope = module("yarn", neox=False)
    impl = OneLayer(rope).bind(3000)
    assert impl.rope.cos_sin is rope.cos_sin_cache and len(rope.cos_sin_cache) == 3000
    assert not impl.rope.neox


def test_layers_of_low_precision_read_the_rounded_table() -> None:
    """Memory computes in float32, but with the cosines and sines as the model's own rotation has them."""
    rope = module("yarn", torch.bfloat16)
    impl = OneLayer(rope).bind(3000)
    assert impl.rope.cos_sin.dtype == torch.float32 and len(impl.rope.cos_sin) == 3000
    assert torch.equal(impl.rope.cos_sin, rope.cos_sin_cache.float())


def test_subclass_of_a_supported_type_is_refused() -> None:
    """A subclass may mean something else by the same table, so only the exact classes pass."""
    rope = module("default")
    rope.__class__ = type("CustomRotaryEmbedding", (type(rope),), {})
    with pytest.raises(ConfigError, match="CustomRotaryEmbedding"):
        check_supported(rope)


@ALL_TYPES
def test_table_that_would_change_is_refused(rope_type: str) -> None:
    """A table whose rows are not what the formula gives is not continued; the message names flag, type and limit."""
    rope = module(rope_type)
    rope.cos_sin_cache[3, 1] += 1e-6
    length = len(rope.cos_sin_cache)
    with pytest.raises(ConfigError, match=rf"--max-model-len 3000: .*{type(rope).__name__}.* {length}") as error:
        extend(rope, 3000)
    assert f"lower --max-model-len to {length}" in str(error.value)
    assert len(rope.cos_sin_cache) == length


def test_several_linear_factors_are_refused() -> None:
    """vLLM puts one table after another for several scaling factors; such a table has no continuation."""
    rope = rotary_embedding.LinearScalingRotaryEmbedding(
        HEAD_SIZE, HEAD_SIZE, 64, BASE, True, [1.0, 4.0], torch.float32
    )
    with pytest.raises(ConfigError, match=r"linear rope scaling factor.*\[1.0, 4.0\]"):
        extend(rope, 3000)
