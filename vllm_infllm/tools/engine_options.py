"""Options that say which engine is meant: they are those of `vllm serve`, and InfLLM's configuration."""

import argparse
import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_infllm.config import KEY
from vllm_infllm.tools import CommandError, UsageError

if TYPE_CHECKING:
    from vllm_infllm.tools.blueprint import Blueprint

Value = TypeVar("Value")
UNITS = {"k": 1 << 10, "m": 1 << 20}


def tokens(text: str) -> int:
    """A number of tokens: 8192, 8k, 1m."""
    number, unit = (text[:-1], UNITS[text[-1].lower()]) if text[-1:].lower() in UNITS else (text, 1)
    if not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens like 8192, 8k or 1m")
    return int(number) * unit


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def list_of(parse: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """A parser of comma-separated values; each comes out once."""

    def parse_all(text: str) -> list[Value]:
        return list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))

    return parse_all


def infllm_fields(text: str) -> dict[str, Any]:
    """InfLLM's configuration as JSON, its names and values still unchecked."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON like '{{\"topk\": 8}}': {error}") from error
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object like '{{\"topk\": 8}}'")
    return fields


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What is not given is vLLM's default."""
    parser.add_argument(
        "--infllm",
        type=infllm_fields,
        default={},
        metavar="JSON",
        help="InfLLM's configuration, what stands under \"infllm\" in vLLM's --additional-config",
    )
    parser.add_argument("--dtype", help="of weights and KV cache")
    parser.add_argument("--max-num-seqs", type=positive, metavar="N", help="requests that run at once")
    parser.add_argument("--max-num-batched-tokens", type=tokens, metavar="TOKENS", help="tokens a step")
    parser.add_argument("--block-size", type=positive, metavar="TOKENS", help="size of a KV block and of a unit")
    parser.add_argument("--kv-cache-memory-bytes", type=positive, metavar="BYTES", help="size of the paged KV cache")
    parser.add_argument("--enforce-eager", action="store_true", default=None, help="without compilation")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_engine_options` that were given, by vLLM's names, but InfLLM's configuration."""
    names = (
        "dtype",
        "max_num_seqs",
        "max_num_batched_tokens",
        "block_size",
        "kv_cache_memory_bytes",
        "enforce_eager",
    )
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def blueprint(model: str, infllm: dict[str, Any], **options: Any) -> "Blueprint":
    """The engine that `vllm serve MODEL --attention-backend infllm` with these options would start, not started.

    Raises:
        CommandError: with vLLM's or InfLLM's message where startup would be refused.
    """
    check_model(model)
    additional = {KEY: infllm}
    with quiet_vllm():
        from vllm.engine.arg_utils import EngineArgs

        from vllm_infllm.tools import blueprint

        try:
            return blueprint.draw(
                EngineArgs(model=model, attention_backend="infllm", additional_config=additional, **options)
            )
        except (ValueError, OSError) as error:
            raise CommandError(_reason(error)) from error


def trained_length(model: str) -> int:
    """Tokens that a model was trained for, as vLLM derives them.

    Raises:
        CommandError: if it cannot be read.
    """
    check_model(model)
    with quiet_vllm():
        from vllm.engine.arg_utils import EngineArgs

        try:
            return EngineArgs(model=model).create_model_config().max_model_len
        except (ValueError, OSError) as error:
            raise CommandError(_reason(error)) from error


@contextlib.contextmanager
def quiet_vllm() -> Iterator[None]:
    """Without what vLLM logs of its progress, and as it is imported, unless VLLM_LOGGING_LEVEL asks for it."""
    from vllm.logger import init_logger

    logger = init_logger("vllm")
    level = logger.level
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_model(model: str) -> None:
    """Say that a folder is missing before a model hub is asked for it.

    Raises:
        UsageError: if `model` is a path, and no model is there.
    """
    looks_like_path = model.startswith((os.sep, ".", "~")) or Path(model).exists()
    if looks_like_path and not Path(model, "config.json").is_file():
        raise UsageError(f"--model {model}: no model is there (config.json is missing): give its folder or name.")


def _reason(error: Exception) -> str:
    """One line; pydantic, which vLLM's configuration uses, says more than that."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").split("\n")[0]
        # What is wrong with one field, or with several together.
        fields = [f"--{str(field).replace('_', '-')} {first['input']}: " for field in first["loc"][:1]]
        return "".join(fields) + reason
    return str(error).split("\n")[0]
