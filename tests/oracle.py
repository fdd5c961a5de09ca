"""InfLLM attention for one sequence and one layer, in float64, written for reading.

This is the meaning of the algorithm ("InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient
Context Memory", arXiv 2402.04617), against which the real implementations are tested. There is no cache, no paging and
no incremental state but the attention received: every execution block looks at the whole q, k and v again.

The tokens as the execution block [s, e) finds them, with U = sealed units and r = n_init + U * block_size:

    0         n_init                              r           s - n_local + 1           s           e
    |---------|-----------|-----------|-----------|-----------|-------------------------|-----------|
    | initial |  unit 0   |    ...    | unit U-1  | remainder |  window of query s                  |
              `---- sealed: only if selected -----'`---------------- unsealed ----------------------'

A later query t of the block has its window further right, at (t - n_local, t]; what it leaves behind joins the
remainder (or the initial tokens, near the start of the sequence, where the window still overlaps them).

Shapes: H query heads, KH key/value heads, N tokens, D head size, B unit size, n = e - s queries, U sealed units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

# Far queries [H, n, D], keys [U, H, B, D] and attention received [U, H, B] of units, scale, repr_topk: scores [U].
Score = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


@dataclass(frozen=True)
class OracleConfig:
    """The parameters of InfLLM."""

    block_size: int  # B, tokens of a unit
    n_init: int  # initial tokens, always visible
    n_local: int  # tokens of the window, the query's own included
    topk: int  # units retrieved for an execution block
    repr_topk: int  # representative tokens of a unit
    exc: int  # largest execution block
    rule: "Score | None" = None  # another selection rule than the paper's

    def __post_init__(self) -> None:
        if self.n_init % self.block_size or self.n_local % self.block_size:
            raise ValueError(f"n_init and n_local must be multiples of block_size: {self}")
        if not 1 <= self.exc <= self.n_local:
            raise ValueError(f"exc must lie in 1..n_local: {self}")
        if not 1 <= self.repr_topk <= self.block_size:
            raise ValueError(f"repr_topk must lie in 1..block_size: {self}")

    def num_sealed(self, position: int) -> int:
        """U(s), the units sealed for an execution block that starts at `position`.

        Those that end at or before s - n_local, that is, wholly outside the window of the query at s - 1 already.
        """
        return max(0, (position - self.n_local - self.n_init) // self.block_size)

    def unit_start(self, unit: int) -> int:
        """First token of a unit; of unit `num_sealed(s)`: the first unsealed token."""
        return self.n_init + unit * self.block_size


class Rope(Protocol):
    """A rotary position embedding in float64."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., N, D] to positions [N]; returns [..., N, D]."""
        ...


class NeoxRope:
    """Half-split (Llama, NeoX) rotation of the first `rotary_dim` elements of a head; the others pass through."""

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        """Use the angles position * base^(-2i/rotary_dim), or the tables cos, sin [max_pos, rotary_dim/2] if given.

        Tables are used as they are, so they may carry a scaling of the angles or an attention factor (YaRN).
        """
        if (cos is None) != (sin is None):
            raise ValueError("give both tables, cos and sin, or none")
        if cos is not None and sin is not None:
            if cos.shape != sin.shape or (rotary_dim is not None and rotary_dim != 2 * cos.shape[1]):
                raise ValueError(f"tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit rotary_dim {rotary_dim}")
            rotary_dim = 2 * cos.shape[1]
            cos, sin = cos.double(), sin.double()
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim > head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and at most head_dim {head_dim}")
        self.inv_freq = base ** (-torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim)
        self.cos, self.sin = cos, sin

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., N, D] to positions [N]; returns [..., N, D] in float64."""
        if self.cos is not None and self.sin is not None:
            cos, sin = self.cos[positions], self.sin[positions]  # [N, rotary_dim/2]
        else:
            angle = positions[:, None].double() * self.inv_freq
            cos, sin = angle.cos(), angle.sin()
        first, second, passed = x.double().split(
            [self.rotary_dim // 2, self.rotary_dim // 2, x.shape[-1] - self.rotary_dim], dim=-1
        )
        return torch.cat([first * cos - second * sin, second * cos + first * sin, passed], dim=-1)


@dataclass
class BlockRecord:
    """What one execution block [start, end) found and selected."""

    start: int
    end: int
    num_sealed: int
    scores: Tensor  # [U], of every sealed unit, also where all are taken
    selected: list[int]  # ascending


@dataclass
class OracleResult:
    """Output of a layer and its memory after the last token; U units are sealed for the token that would come next."""

    output: Tensor  # [H, N, Dv]
    blocks: list[BlockRecord]
    acc: Tensor  # [U, H, B], attention received by the tokens of each unit
    repr_tokens: Tensor  # [U, H, repr_topk], offsets in the unit, ascending
    repr_keys: Tensor  # [U, H, D]


@dataclass
class Visible:
    """The four parts of what the n queries of an execution block see of the tokens before its end: bool [n, e] each."""

    local: Tensor
    initial: Tensor
    remainder: Tensor
    retrieved: Tensor

    @property
    def far(self) -> Tensor:
        """Everything seen at the one constant distance n_local - 1: bool [n, e]."""
        return self.initial | self.remainder | self.retrieved


def execution_blocks(config: OracleConfig, appends: list[int], prompt_len: int | None) -> list[tuple[int, int]]:
    """Cut a sequence handed over in chunks of `appends` tokens into execution blocks [s, e).

    Cuts lie at absolute positions that are multiples of `exc`, before the last token of the prompt (not if
    `prompt_len` is None), and at the ends of the chunks.
    """
    if any(length < 1 for length in appends):
        raise ValueError(f"empty append in {appends}")
    total = sum(appends)
    cuts = {0, total} | set(range(0, total, config.exc))
    if prompt_len is not None and 0 <= prompt_len - 1 < total:
        cuts.add(prompt_len - 1)
    end = 0
    for length in appends:
        end += length
        cuts.add(end)
    return list(pairwise(sorted(cuts)))


def highest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of values [..., n], ascending: [..., count]. On equal values the lower index."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def visible_tokens(config: OracleConfig, start: int, end: int, selected: list[int]) -> Visible:
    """What each query t of [start, end) sees of the tokens j < end, if `selected` are the units selected."""
    token = torch.arange(end)
    distance = torch.arange(start, end)[:, None] - token  # t - j
    out_of_window = distance >= config.n_local
    first_unsealed = config.unit_start(config.num_sealed(start))

    in_selected_unit = torch.zeros(end, dtype=torch.bool)
    for unit in selected:
        in_selected_unit[config.unit_start(unit) : config.unit_start(unit + 1)] = True

    return Visible(
        local=(distance >= 0) & (distance < config.n_local),
        initial=(token < config.n_init) & out_of_window,
        remainder=(token >= first_unsealed) & out_of_window,
        retrieved=in_selected_unit.expand_as(distance),
    )


def infllm_attention(
    config: OracleConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope,
    scale: float,
    blocks: list[tuple[int, int]],
) -> OracleResult:
    """InfLLM attention of one layer over a whole sequence.

    q [H, N, D], k [KH, N, D] and v [KH, N, Dv] (Dv may differ from D) are not rotated; `scale` multiplies the logits;
    `blocks` are the execution blocks, in order, covering [0, N).
    """
    num_tokens = q.shape[1]
    if [0, *(e for _, e in blocks)] != [*(s for s, _ in blocks), num_tokens] or any(s >= e for s, e in blocks):
        raise ValueError(f"the execution blocks do not cover {num_tokens} tokens one after another: {blocks}")
    q, k, v = _per_query_head(q, k, v)
    num_heads, _, head_dim = q.shape

    # Near: query and key at their own positions, so that only t - j matters.
    positions = torch.arange(num_tokens)
    q_near = rope.rotate(q, positions)
    k_near = rope.rotate(k, positions)
    # Far: the query at position n_local - 1, the key at position 0. The same distance for every far token. At position
    # 0 nothing is turned; only a table that carries an attention factor (YaRN) scales, as it does for near keys.
    q_far = rope.rotate(q, torch.full((num_tokens,), config.n_local - 1))
    k_far = rope.rotate(k, torch.zeros(num_tokens, dtype=torch.int64))

    output = torch.empty(num_heads, num_tokens, v.shape[-1], dtype=torch.float64)
    acc = torch.zeros(num_heads, num_tokens, dtype=torch.float64)
    records: list[BlockRecord] = []
    repr_tokens = torch.empty(0, num_heads, config.repr_topk, dtype=torch.int64)
    repr_keys = torch.empty(0, num_heads, head_dim, dtype=torch.float64)

    for s, e in blocks:
        num_sealed = config.num_sealed(s)

        # Select: score(u) = sum over heads of < mean of the block's far queries, representative of u >.
        far_reprs = rope.rotate(repr_keys, torch.zeros(num_heads, dtype=torch.int64))
        scores = torch.einsum("hd,uhd->u", q_far[:, s:e].mean(dim=1), far_reprs)
        if config.rule and num_sealed:
            sealed = slice(config.unit_start(0), config.unit_start(num_sealed))
            keys = k[:, sealed].unflatten(1, (num_sealed, -1)).transpose(0, 1)
            received = acc[:, sealed].unflatten(1, (num_sealed, -1)).transpose(0, 1)
            scores = config.rule(q_far[:, s:e], keys, received, scale, config.repr_topk)
        selected = list(range(num_sealed)) if num_sealed <= config.topk else highest(scores, config.topk).tolist()
        records.append(BlockRecord(s, e, num_sealed, scores, selected))

        # Attend: one softmax over everything visible, local and far together. The columns are the tokens that some
        # query of the block sees locally, then those that some query sees far; the masks say which query sees which.
        visible = visible_tokens(config, s, e, selected)
        near, near_logits = _masked_logits(q_near[:, s:e], k_near, visible.local)
        far, far_logits = _masked_logits(q_far[:, s:e], k_far, visible.far)
        p = (torch.cat([near_logits, far_logits], dim=-1) * scale).softmax(dim=-1)  # [H, n, near + far]
        output[:, s:e] = p @ v[:, torch.cat([near, far])]

        # Accumulate: a token collects attention only from the queries whose window it is in.
        acc[:, near] += p[..., : len(near)].sum(dim=1)

        # Seal: units that the window of the block's last query no longer touches; their attention is complete.
        for unit in range(num_sealed, config.num_sealed(e)):
            tokens, representative = _representative(config, unit, acc, k)
            repr_tokens = torch.cat([repr_tokens, tokens[None]])
            repr_keys = torch.cat([repr_keys, representative[None]])

    num_units = config.num_sealed(num_tokens)
    sealed_tokens = acc[:, config.n_init :][:, : num_units * config.block_size]
    unit_acc = sealed_tokens.reshape(num_heads, num_units, config.block_size).transpose(0, 1)
    return OracleResult(output, records, unit_acc, repr_tokens, repr_keys)


def full_attention(q: Tensor, k: Tensor, v: Tensor, rope: Rope, scale: float) -> Tensor:
    """Dense causal attention, what a model does without InfLLM. Shapes as in `infllm_attention`; returns [H, N, Dv]."""
    q, k, v = _per_query_head(q, k, v)
    positions = torch.arange(q.shape[1])
    q, k = rope.rotate(q, positions), rope.rotate(k, positions)
    future = positions > positions[:, None]  # [N queries, N keys]
    output = torch.empty(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    for head in range(q.shape[0]):  # one [N, N] matrix at a time
        logits = (q[head] @ k[head].T * scale).masked_fill_(future, -torch.inf)
        output[head] = logits.softmax(dim=-1) @ v[head]
    return output


def _per_query_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, with k and v [KH, N, ...] repeated so that query head h finds its kv head h // (H // KH) at h."""
    group = q.shape[0] // k.shape[0]
    return q.double(), k.double().repeat_interleave(group, dim=0), v.double().repeat_interleave(group, dim=0)


def _masked_logits(q: Tensor, k: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of q [H, n, D] with the keys k [H, N, D], under the mask visible [n, e].

    Returns the tokens that any of the queries sees, [m], and their logits, [H, n, m], -inf where the mask is false.
    """
    tokens = visible.any(dim=0).nonzero().squeeze(1)
    logits = q @ k[:, tokens].mT
    return tokens, logits.masked_fill_(~visible[:, tokens], -torch.inf)


def _representative(config: OracleConfig, unit: int, acc: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [H, repr_topk] of the tokens that received most, of acc [H, N], and the mean of their keys k: [H, D]."""
    tokens = slice(config.unit_start(unit), config.unit_start(unit + 1))
    offsets = highest(acc[:, tokens], config.repr_topk)
    keys = k[:, tokens].gather(1, offsets[:, :, None].expand(-1, -1, k.shape[-1]))
    return offsets, keys.mean(dim=1)
