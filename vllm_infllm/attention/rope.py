"""The rotary table: extension to max_model_len, inverse and far rotation.

The model's own rotary module stays in place and rotates q and k to their absolute positions. Memory needs two more
rotations, both read from that module's cos/sin table: the inverse rotation of keys and queries, and the rotation of
queries to the far position n_local - 1.
"""

from dataclasses import dataclass

import torch

from vllm_infllm.config import ConfigError


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin of one rotary module.

    cos_sin: [max_position, rotary_dim] float32, cosines then sines, as rounded to the model's dtype.
    neox: pairs are (i, i + rotary_dim/2); otherwise (2i, 2i + 1).
    """

    cos_sin: torch.Tensor
    neox: bool

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x [N, heads, D] by the rows `positions` [N] (or a single position [1]); float32 out."""
        return self._apply(x, *self._rows(positions))

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Take the rotation by the rows `positions` off x [N, heads, D] again; float32 out.

        Divides by cos^2 + sin^2, so tables rounded to bf16 or carrying an attention factor (YaRN) invert exactly.
        """
        cos, sin = self._rows(positions)
        norm = cos * cos + sin * sin
        return self._apply(x, cos / norm, -sin / norm)

    def far(self, x: torch.Tensor, positions: torch.Tensor, n_local: int) -> torch.Tensor:
        """Queries x [N, heads, D], rotated at `positions` [N], at distance n_local - 1 from keys at position 0.

        Stored keys carry no rotation at all. What a key at position 0 does carry, the attention factor of a YaRN
        table, goes into the query.
        """
        far = self.rotate(self.unrotate(x, positions), torch.tensor([n_local - 1], device=x.device))
        far[..., : self.cos_sin.shape[1]] *= self.cos_sin[0, 0]
        return far

    def _rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.cos_sin[positions][:, None, :].chunk(2, dim=-1)
        return cos, sin

    def _apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x.float()
        rotary_dim = self.cos_sin.shape[1]
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.neox:
            first, second = turned.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def extend(rope: torch.nn.Module, max_len: int) -> None:
    """Extend the table of a vLLM rotary module to max_len positions, in place.

    Raises:
        ConfigError: if the rope type has no table that can be continued, or if continuing it would change the rows
            that are there already.
    """
    if hasattr(rope, "cos_sin_cache") and rope.cos_sin_cache.shape[0] >= max_len:
        return
    check_supported(rope)
    old = rope.cos_sin_cache
    with torch.device(old.device):
        new = _table(rope, max_len).to(old.dtype)
    if not torch.equal(new[: old.shape[0]], old):
        raise _cannot_extend(rope, max_len)
    rope.cos_sin_cache = new


def check_supported(rope: torch.nn.Module) -> None:
    """Refuse rope types whose angles are not a function of one position alone.

    Raises:
        ConfigError: naming the type.
    """
    if type(rope).__name__ not in _ANGLES:
        raise ConfigError(
            f"InfLLM does not support the rope type {type(rope).__name__}: supported are {', '.join(_ANGLES)}. "
            "Remove --attention-backend infllm, or override rope_scaling with --hf-overrides."
        )


def _table(rope: torch.nn.Module, max_len: int) -> torch.Tensor:
    inv_freq, step, factor = _ANGLES[type(rope).__name__](rope)
    angles = torch.einsum("i,j -> ij", torch.arange(max_len, dtype=torch.float) / step, inv_freq)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)


def _plain(rope: torch.nn.Module) -> tuple[torch.Tensor, float, float]:
    return rope._compute_inv_freq(rope.base), 1.0, 1.0


def _linear(rope: torch.nn.Module) -> tuple[torch.Tensor, float, float]:
    if len(rope.scaling_factors) != 1:
        raise ConfigError(f"InfLLM supports one linear rope scaling factor, not {rope.scaling_factors}.")
    return rope._compute_inv_freq(rope.base), rope.scaling_factors[0], 1.0


def _yarn(rope: torch.nn.Module) -> tuple[torch.Tensor, float, float]:
    return rope._compute_inv_freq(rope.scaling_factor), 1.0, rope.mscale


# Rope class of vLLM -> (inverse frequencies, positions a step, attention factor). By exact class: a subclass may
# mean something else by the same table.
_ANGLES = {
    "RotaryEmbedding": _plain,
    "Llama3RotaryEmbedding": _plain,
    "LinearScalingRotaryEmbedding": _linear,
    "YaRNScalingRotaryEmbedding": _yarn,
}


def _cannot_extend(rope: torch.nn.Module, max_len: int) -> ConfigError:
    return ConfigError(
        f"--max-model-len {max_len}: the table of rope type {type(rope).__name__} ends at "
        f"{rope.cos_sin_cache.shape[0]} and cannot be extended without changing it: "
        f"lower --max-model-len to {rope.cos_sin_cache.shape[0]}."
    )
