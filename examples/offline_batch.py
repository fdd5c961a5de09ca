"""Ask several long texts at once for the pass key that is hidden in each of them."""

import argparse

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.passkey import passkey_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 2000, 4000], help="tokens of each prompt")
    args = parser.parse_args()
    model = args.model or str(demo_model())

    tokenizer = AutoTokenizer.from_pretrained(model)
    keys = [31415 + number for number in range(len(args.lengths))]
    prompts = [passkey_prompt(tokenizer, n, 0.2, key) for n, key in zip(args.lengths, keys, strict=True)]

    llm = LLM(
        model,
        dtype="auto" if args.model else demo_dtype(),
        attention_backend="infllm",
        # A small window, so that even these prompts outgrow it; leave both out to get the paper's.
        additional_config={"infllm": {"n_local": 1024, "topk": 8}},
        max_model_len=32768,
        max_num_seqs=len(prompts),
        enforce_eager=True,  # starts sooner, runs slower
    )
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for prompt, key, output in zip(prompts, keys, outputs, strict=True):
        print(f"{len(prompt):>6} tokens, key {key}: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
