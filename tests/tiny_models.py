"""Tiny models of random weights, one of each family that InfLLM is tested with."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 32,
        },
    ),
}


def make(family: str, folder: Path, **overrides: Any) -> str:
    """Write a model of `family` with seeded random weights (float32) into `folder`; returns its path."""
    name, extra = FAMILIES[family]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + suffix)(**{**COMMON, **extra, **overrides})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder)
    return str(folder)


def add_tokenizer(folder: Path) -> None:
    """Words t000 .. t255, each a token of that number, separated by blanks; a chat is its messages in order.

    Token 2 is what no word is. Its name is longer than a word with its blank: vLLM refuses a text unread if it has more
    characters than max_model_len tokens of the longest name.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {i: f"t{i:03}" for i in range(VOCAB)} | {2: "<unknown>"}
    words = Tokenizer(models.WordLevel({name: i for i, name in names.items()}, unk_token=names[2]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "t000", "eos_token": "t001", "pad_token": names[2]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


if __name__ == "__main__":
    make("llama", Path(sys.argv[1]))
    add_tokenizer(Path(sys.argv[1]))
