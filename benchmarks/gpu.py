"""Stock FlashAttention against InfLLM on a GPU: pass keys first, then seconds to the first token and milliseconds for
each further one.

Needs a machine with a GPU, vLLM for CUDA, and vllm-infllm with its CUDA kernels (`vllm-infllm doctor` tells). InfLLM
must find every pass key before anything is measured; else the exit status is 1. Random weights find none: with
--random-weights only time is measured, which depends on the shapes alone. Writes the table of docs/gpu.md and a JSON
with all samples.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.floors import MODELS, Model
from benchmarks.machine import describe
from benchmarks.tables import fill_in
from vllm_infllm.config import DEFAULT_BLOCK_SIZE
from vllm_infllm.plugin import unsupported_vllm
from vllm_infllm.tools import CommandError
from vllm_infllm.tools.demo_worker import Answer, Job
from vllm_infllm.tools.passkey import passkey_prompt
from vllm_infllm.tools.tables import Table
from vllm_infllm.tools.worker_process import json_lines

WORKER = "vllm_infllm.tools.demo_worker"
SIDES = ("infllm", "stock")
KEYS = {0.1: 71432, 0.5: 28906, 0.9: 53187}
"""Pass keys by depth."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except CommandError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or name of a model")
    names = [model.name for model in MODELS]
    model.add_argument("--random-weights", choices=names, help="a model's sizes, without its weights and vocabulary")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072], help="tokens a prompt")
    parser.add_argument("--answer", type=int, default=129, help="tokens of a measured answer (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="measured prompts a length (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as vLLM's --dtype (default: %(default)s)")
    parser.add_argument("--infllm", type=json.loads, default={}, help="InfLLM's configuration as JSON (default: {})")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of gpu.md (default: docs)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Ask, measure, write."""
    if unsupported := unsupported_vllm():
        raise CommandError(unsupported)
    console = Console()
    record: dict[str, Any] = {
        "environment": describe(args.dtype, "default") | {"device": _device()},
        "arguments": {**vars(args), "output": str(args.output)},
        "answers": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        if args.random_weights:
            _write_config(Path(folder), next(model for model in MODELS if model.name == args.random_weights))
        for side in SIDES:
            record["answers"][side] = answers = _ask(side, args.model or folder, args, console)
            asked_keys = [asked for asked in answers if asked["key"]]
            missed = [asked["prompt"] for asked in asked_keys if not asked["found"]]
            console.print(f"{side}: {len(asked_keys) - len(missed)} of {len(asked_keys)} keys")
            if side == "infllm" and missed:
                raise CommandError(f"infllm missed pass keys ({', '.join(missed)}): nothing was measured")
            # Each side's, so that what was measured is there whatever becomes of the other.
            (args.output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    table = _table(record["answers"], args)
    console.print(table.rich())
    page = args.output / "gpu.md"
    text = page.read_text() if page.exists() else ""
    of = f"{args.random_weights} with random weights" if args.random_weights else args.model
    where = f"{of} on one {record['environment']['device']}, medians of {args.runs}:"
    page.write_text(fill_in(text, {"gpu-measured": f"{where}\n\n{table.markdown()}"}))
    return 0


def _write_config(folder: Path, model: Model) -> None:
    """What vLLM reads of a Llama; all of these models have its layers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _device() -> str:
    """Without a CUDA context in this process, which would take memory from the engines."""
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name()) if not current_platform.is_cpu() else "CPU"


def _ask(side: str, model: str, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Answers of one side: a key a depth and length, then `runs` long answers a length."""
    asked = list(_random_questions(args) if args.random_weights else _questions(model, args))
    sampling = {"ignore_eos": True, "detokenize": not args.random_weights}
    job = Job(_engine(side, model, args), [prompt for _, _, prompt in asked], args.answer, sampling)
    answers: list[dict[str, Any]] = []
    for event in json_lines(WORKER, asdict(job), side, {}):
        if "text" not in event:
            continue
        name, key, prompt = asked[len(answers)]
        answer = Answer(**event)
        found = answer.text.strip().startswith(str(key))
        answers.append({"prompt": name, "length": len(prompt), "key": key, "found": found, **asdict(answer)})
        console.print(f"{side}: {name}: {answer.first_seconds:.2f} s to the first token")
        if side == "infllm" and key and not found:
            break
    return answers


def _questions(model: str, args: argparse.Namespace) -> Iterator[tuple[str, int, list[int]]]:
    """Name, pass key (0: only measured) and prompt; all keys come before what is measured."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)
    for length in args.lengths:
        for depth, key in KEYS.items():
            yield f"{length} tokens, key at depth {depth}", key, passkey_prompt(tokenizer, length, depth, key)
    for name, length, run_ in _measured(args):
        # The key makes every prompt another one.
        yield name, 0, passkey_prompt(tokenizer, length, 0.0, 10000 + run_)


def _random_questions(args: argparse.Namespace) -> Iterator[tuple[str, int, list[int]]]:
    """The same without keys, of any tokens; first one of each length that is not measured."""
    draw = random.Random(0)
    for length in args.lengths:
        yield f"{length} tokens, warm-up", 0, [draw.randrange(1000, 30000) for _ in range(length)]
    for name, length, _ in _measured(args):
        yield name, 0, [draw.randrange(1000, 30000) for _ in range(length)]


def _measured(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Name, length and number of each prompt that is measured."""
    for run_ in range(args.runs):
        for length in args.lengths:
            yield f"{length} tokens, run {run_ + 1}", length, run_


def _engine(side: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoConfig

    longest = max(args.lengths) + args.answer
    common = {
        "model": model,
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": 1,
        "block_size": DEFAULT_BLOCK_SIZE if side == "infllm" else None,
        "enable_prefix_caching": False,
    }
    if args.random_weights:
        common |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if side == "infllm":
        return common | {"attention_backend": "infllm", "additional_config": {"infllm": args.infllm}}
    trained = AutoConfig.from_pretrained(model).max_position_embeddings
    # vLLM refuses more than that, unless the rotary table is made as long.
    return common | ({"hf_overrides": {"max_position_embeddings": longest}} if longest > trained else {})


def _table(answers: Mapping[str, Sequence[Mapping[str, Any]]], args: argparse.Namespace) -> Table:
    """Medians over the measured prompts."""
    rows = []
    for length in args.lengths:
        cells = [f"{length:,}"]
        by_side = {side: _medians(answers[side], f"{length} tokens, run ") for side in SIDES}
        for which in (0, 1):
            ours, stock = by_side["infllm"][which], by_side["stock"][which]
            cells += [f"{stock:.3g}", f"{ours:.3g}", f"{stock / ours:.2f}"]
        rows.append(cells)
    header = ("tokens", "first token s: stock", "infllm", "ratio", "further token ms: stock", "infllm", "ratio")
    return Table("Stock against InfLLM", header, rows)


def _medians(answers: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Seconds to the first token, milliseconds for each further one."""
    runs = [answer for answer in answers if answer["prompt"].startswith(name)]
    further = [1e3 * (run_["seconds"] - run_["first_seconds"]) / max(1, run_["tokens"] - 1) for run_ in runs]
    return median(run_["first_seconds"] for run_ in runs), median(further)


if __name__ == "__main__":
    sys.exit(main())
