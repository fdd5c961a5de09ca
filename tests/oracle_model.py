"""A Hugging Face model whose full-attention layers run the oracle: what vLLM with InfLLM must reproduce."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.oracle import NeoxRope, OracleConfig, execution_blocks, infllm_attention


@torch.no_grad()
def oracle_logprobs(folder: str, config: OracleConfig, tokens: list[int]) -> Tensor:
    """Log-probability of each token but the first, [N - 1] float64, by the weights in `folder`.

    Layers with a sliding window keep it; all others attend as the oracle does.
    """
    ALL_ATTENTION_FUNCTIONS.register("oracle", _attention)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="oracle").eval()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.oracle = config
        layer.self_attn.table = _table(model.model, layer, len(tokens))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def _table(model: Any, layer: Any, length: int) -> NeoxRope:
    """The rotation that the model applies in this layer, as tables."""
    x = torch.zeros(1, dtype=torch.float64)
    kind = getattr(layer.self_attn, "layer_type", None)
    positions = torch.arange(length)[None]
    per_kind = hasattr(model.rotary_emb, "full_attention_inv_freq")
    cos, sin = model.rotary_emb(x, positions, kind) if per_kind else model.rotary_emb(x, positions)
    half = cos.shape[-1] // 2
    return NeoxRope(layer.self_attn.head_dim, cos=cos[0, :, :half], sin=sin[0, :, :half])


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention interface of transformers: query [1, H, N, D], key and value [1, KH, N, D], rotated."""
    window = kwargs.get("sliding_window")
    if window is not None:
        output = _sliding_window(query[0], key[0], value[0], scaling, window)
    else:
        rope, config = module.table, module.oracle
        query, key = _unrotate(query[0], rope), _unrotate(key[0], rope)
        blocks = execution_blocks(config, [query.shape[1]], query.shape[1])
        output = infllm_attention(config, query, key, value[0], rope, scaling, blocks).output
    return output.transpose(0, 1)[None], None


def _unrotate(x: Tensor, rope: NeoxRope) -> Tensor:
    """The raw x [heads, N, D]: turning by the opposite angle, over the squared factor that the table carries."""
    assert rope.cos is not None and rope.sin is not None
    norm = rope.cos**2 + rope.sin**2
    inverse = NeoxRope(x.shape[-1], cos=rope.cos / norm, sin=-rope.sin / norm)
    return inverse.rotate(x, torch.arange(x.shape[1]))


def _sliding_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    logits = (query @ key.mT * scale).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    return logits.softmax(-1) @ value
