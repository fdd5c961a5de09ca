"""Start `vllm serve` with InfLLM, stream an answer through the OpenAI client, stop the server."""

import argparse
import subprocess
import sys
import time
import urllib.request

import openai
from transformers import AutoTokenizer

from vllm_infllm.tools.model import demo_dtype, demo_model
from vllm_infllm.tools.passkey import passkey_prompt

KEY = 16180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or name of a model (default: the demo model)")
    parser.add_argument("--length", type=int, default=4000, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    model = args.model or str(demo_model())

    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(args.port)]
    infllm = ["--attention-backend", "infllm", "--additional-config", '{"infllm": {"n_local": 1024, "topk": 8}}']
    sizes = ["--max-model-len", "32768", "--max-num-seqs", "4", "--enforce-eager"]
    dtype = ["--dtype", "auto" if args.model else demo_dtype()]
    server = subprocess.Popen([*serve, *infllm, *sizes, *dtype], stdout=sys.stderr)
    try:
        wait_until_up(server, f"http://127.0.0.1:{args.port}/health")
        prompt = passkey_prompt(AutoTokenizer.from_pretrained(model), args.length, 0.2, KEY)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", timeout=600)
        print(f"{len(prompt)} tokens, key {KEY}:", end="", flush=True)
        for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0, stream=True):
            print(chunk.choices[0].text, end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


def wait_until_up(server: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers; an error when it has ended instead."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server ended with status {server.returncode}; its log is above")


if __name__ == "__main__":
    main()
