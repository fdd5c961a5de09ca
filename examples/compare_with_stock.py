"""Answer the same prompts with stock vLLM and with InfLLM.

Prompts that fit into the window get the same answer, but for rounding; longer ones may not. `vllm-infllm demo` compares
both on texts that are longer than the model was trained for.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.passkey import passkey_prompt

SIDES: dict[str, dict[str, Any]] = {
    "stock": {},
    "infllm": {"attention_backend": "infllm", "additional_config": {"infllm": {"n_local": 1024, "topk": 8}}},
}


def answers(engine: dict[str, Any], prompts: list[list[int]]) -> list[tuple[str, float]]:
    """The text and the seconds of each prompt, one after another."""
    llm = LLM(**engine, max_model_len=8192, max_num_seqs=1, kv_cache_memory_bytes=1 << 30, enforce_eager=True)
    found = []
    for prompt in prompts:
        start = time.monotonic()
        (output,) = llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=8))
        found.append((output.outputs[0].text, time.monotonic() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 3000], help="tokens of each prompt")
    args = parser.parse_args()
    model = {"model": args.model or str(demo_model()), "dtype": "auto" if args.model else demo_dtype()}
    tokenizer = AutoTokenizer.from_pretrained(model["model"])
    prompts = [passkey_prompt(tokenizer, length, 0.2, 14142) for length in args.lengths]

    for name, engine in SIDES.items():
        # A process of its own: the memory of one side is free before the other starts.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found = process.submit(answers, model | engine, prompts).result()
        for prompt, (text, seconds) in zip(prompts, found, strict=True):
            print(f"{name:>6}, {len(prompt):>5} tokens: {text!r} in {seconds:.1f} s")


if __name__ == "__main__":
    main()
