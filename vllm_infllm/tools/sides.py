"""The engines that are compared: stock full attention, InfLLM by any selection rule, InfLLM without retrieval."""

import sys
from collections.abc import Mapping
from typing import Any

from vllm_infllm.selection import RULES
from vllm_infllm.tools import UsageError
from vllm_infllm.tools.model import full_cache_bytes

_SELECTION = {f"infllm-{rule}": rule for rule in RULES}
BACKENDS = ("infllm", "streaming", "full", *_SELECTION)
CHUNK = 2048
BLOCK_SIZE = 128
# On a CPU vLLM keeps a core free for its other processes; with few requests at a time they sleep while it computes.
ENV = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def engine_arguments(
    backend: str, model: str, dtype: str, max_model_len: int, infllm: Mapping[str, Any], max_num_seqs: int = 1
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`: uncompiled, without prefix caching, in the memory that the requests need.

    backend: "infllm", "infllm-RULE" (of vllm_infllm.selection), "streaming" (retrieves nothing) or "full" (stock).
    """
    common = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": CHUNK,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    if backend == "full":
        # vLLM refuses a length that the model was not trained on, and would take nearly all memory of a CPU machine.
        # The override, unlike the environment variable that also allows the length, makes its rotary tables as long.
        return common | {
            "hf_overrides": {"max_position_embeddings": max_model_len},
            "kv_cache_memory_bytes": max_num_seqs * full_cache_bytes(model, dtype, max_model_len, BLOCK_SIZE),
        }
    own: dict[str, Any] = {"topk": 0} if backend == "streaming" else {}
    if rule := _SELECTION.get(backend):
        own = {"selection": rule}
    return common | {"attention_backend": "infllm", "additional_config": {"infllm": {**infllm, **own}}}


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, whatever the length of a text.

    Raises:
        UsageError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)
    except (OSError, ValueError) as error:
        # Of several lines the first says what is wrong, the others what a user of the hub may do.
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--model {model}: {reason}") from error
