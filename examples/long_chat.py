"""A chat whose history outgrows the window: what was said at its beginning is asked for at its end.

Prefix caching is not supported yet, so every turn computes the whole history again.
"""

import argparse

from vllm import LLM, SamplingParams

from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.passkey import FILLER, NEEDLE, TASK

KEY = 27182
QUESTION = "What is the pass key? Answer with the five digits."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--turns", type=int, default=3, help="messages before the question (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=35, help="lines of filler in each (default: %(default)s)")
    args = parser.parse_args()

    llm = LLM(
        args.model or str(demo_model()),
        dtype="auto" if args.model else demo_dtype(),
        attention_backend="infllm",
        additional_config={"infllm": {"n_local": 1024, "topk": 8}},
        max_model_len=32768,
        max_num_seqs=1,
        enforce_eager=True,  # starts sooner, runs slower
    )
    filler = FILLER * args.lines
    said = [TASK + FILLER * 5 + NEEDLE.format(key=KEY) + filler, *[filler] * (args.turns - 1), QUESTION]
    history: list[dict[str, str]] = []
    for message in said:
        history.append({"role": "user", "content": message})
        (output,) = llm.chat(history, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        answer = output.outputs[0].text
        history.append({"role": "assistant", "content": answer})
        print(f"{len(output.prompt_token_ids or []):>6} tokens of history: {answer!r}")


if __name__ == "__main__":
    main()
