"""The plugin's configuration: `--additional-config '{"infllm": {...}}'`."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_infllm.memory.geometry import Geometry
from vllm_infllm.selection import RuleName

KEY = "infllm"
DEFAULT_BLOCK_SIZE = 128

_NonNegative = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(gt=0)]


class ConfigError(ValueError):
    """A flag or field that InfLLM cannot work with; the message names it, its value and the remedy."""


class InfLLMConfig(BaseModel):
    """Effective configuration. Sizes are in tokens; names and defaults follow the paper (section 4.1)."""

    # The docstrings below the fields are the configuration reference (docs/configuration.py).
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    n_init: _NonNegative = 128
    """Initial tokens, attended by every query; a multiple of the block size."""
    n_local: _Positive = 4096
    """Sliding window; a multiple of the block size."""
    topk: _NonNegative = 16
    """Units retrieved for each execution block; 0: window and initial tokens only."""
    repr_topk: _Positive = 4
    """Representative tokens of a unit: those that got most attention while in the window; at most the block size."""
    selection: RuleName = "mean"
    """Which units are retrieved: `mean`, the paper's rule, or another one (docs/selection.md), on the CPU platform."""
    exc_block_size: _Positive = 512
    """Queries of a prompt that share one retrieval; at most `n_local`."""
    max_cached_blocks: _NonNegative | None = None
    """Retrieved units that stay resident in a request's own KV blocks, at least `topk`; 0: read from host memory in
    place. If not given, 0 on a CPU and twice `topk` on a GPU."""
    cache_strategy: Literal["lru", "fifo", "lru-s"] = "lru"
    """Which resident unit leaves first: the least recently used (`lru`), the first that came (`fifo`), or the one with
    the least decayed attention mass (`lru-s`)."""
    score_decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Decay of the attention mass of `lru-s` for each execution block."""
    host_memory_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Host memory for units, in GiB; if not given, what is free at startup, less a reserve."""
    ops: Literal["cpu", "triton", "reference"] | None = None
    """Implementation of the operations: `cpu` (C++), `triton` (Triton and CUDA) or `reference` (plain torch: readable
    and slow). If not given, `cpu` on a CPU and `triton` on a GPU."""
    local_attention: Literal["xformers"] | None = None
    """Who computes the middle of the window of a prompt's execution blocks: `xformers`, optional, on a GPU; if not
    given, the operations themselves."""
    block_size: _Positive = DEFAULT_BLOCK_SIZE
    """Unit size: vLLM's --block-size. Not a key of its own."""

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.block_size, self.n_init, self.n_local, self.exc_block_size)

    @property
    def kept_blocks(self) -> int:
        """Leading KV blocks that a request keeps for life.

        The first names the request to the worker; with a residency cache they are its slots.
        """
        return self.n_init // self.block_size + self.max_cached_blocks if self.max_cached_blocks else 1


def resolve(user: Any, block_size: int, trained_len: int) -> InfLLMConfig:
    """Check what the user wrote and fill in defaults that fit the model.

    Args:
        user: the value under "infllm" in --additional-config.
        block_size: vLLM's block size in tokens.
        trained_len: context length that the model was trained for, in tokens.

    Raises:
        ConfigError: naming the field, its value and what to do.
    """
    given = _checked_keys(user)
    parsed = _parse({**given, "block_size": block_size})
    if "n_local" not in given and block_size > parsed.n_local:
        raise ConfigError(
            f"--block-size {block_size} is larger than the default window of {parsed.n_local} tokens: lower it, or set "
            f'--additional-config "{KEY}": n_local.'
        )
    config = _fitted(parsed, given, trained_len)
    _check_sizes(config)
    _check_span(config, given, trained_len)
    return config


def explain_shrinking(config: InfLLMConfig, user: dict[str, Any]) -> str:
    """What of the defaults was shrunk to fit the model, for the startup line; empty if nothing was."""
    names = [n for n in ("n_init", "n_local", "exc_block_size") if n not in user]
    fields = InfLLMConfig.model_fields
    shrunk = [
        f"{n} {fields[n].default} -> {getattr(config, n)}" for n in names if getattr(config, n) != fields[n].default
    ]
    return ", ".join(shrunk)


def _checked_keys(user: Any) -> dict[str, Any]:
    if not isinstance(user, dict):
        raise ConfigError(f'--additional-config "{KEY}" must be a JSON object like {{"topk": 16}}, not {user!r}.')
    known = [name for name in InfLLMConfig.model_fields if name != "block_size"]
    for key in user:
        if key == "block_size":
            raise ConfigError(f"{_field(key, user[key])}: the unit size is vLLM's own; set --block-size instead.")
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f'Did you mean "{close[0]}"? ' if close else ""
            raise ConfigError(f"{_field(key, user[key])}: unknown field. {hint}Known fields: {', '.join(known)}.")
    return dict(user)


def _parse(values: dict[str, Any]) -> InfLLMConfig:
    try:
        return InfLLMConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{_field(name, first['input'])}: {reason}.") from None


def _span(config: InfLLMConfig) -> int:
    """Tokens that the model must have been trained for: window, initial tokens, a unit and an execution block."""
    return config.n_init + config.n_local + config.block_size + config.exc_block_size


def _fitted(config: InfLLMConfig, given: dict[str, Any], trained_len: int) -> InfLLMConfig:
    """Adapt what was not given: the largest default window that fits the trained length, and sizes that divide."""
    block = config.block_size
    n_init = config.n_init if "n_init" in given else -(-config.n_init // block) * block
    windows = [config.n_local] if "n_local" in given else range(config.n_local // block * block, 0, -block)
    candidate = config
    for n_local in windows:
        exc = config.exc_block_size if "exc_block_size" in given else min(config.exc_block_size, n_local)
        candidate = config.model_copy(update={"n_init": n_init, "n_local": n_local, "exc_block_size": exc})
        if _span(candidate) <= trained_len:
            break
    return candidate


def _check_sizes(config: InfLLMConfig) -> None:
    for name in ("n_init", "n_local"):
        value = getattr(config, name)
        if value % config.block_size:
            raise ConfigError(
                f"{_field(name, value)} is not a multiple of --block-size {config.block_size}: "
                f"use {value // config.block_size * config.block_size or config.block_size}, or another --block-size."
            )
    if config.exc_block_size > config.n_local:
        raise ConfigError(
            f"{_field('exc_block_size', config.exc_block_size)} is larger than n_local {config.n_local}: "
            "lower exc_block_size or raise n_local."
        )
    if config.repr_topk > config.block_size:
        raise ConfigError(
            f"{_field('repr_topk', config.repr_topk)} is larger than --block-size {config.block_size}: lower repr_topk."
        )
    if config.max_cached_blocks and config.max_cached_blocks < config.topk:
        raise ConfigError(
            f"{_field('max_cached_blocks', config.max_cached_blocks)} is below topk {config.topk}, and all retrieved "
            "units must be resident at once: raise it, or set 0 to read units from host memory in place."
        )


def _check_span(config: InfLLMConfig, given: dict[str, Any], trained_len: int) -> None:
    """The model must have been trained on all distances that it meets."""
    if _span(config) <= trained_len:
        return
    ours = {name: getattr(config, name) for name in ("n_init", "n_local", "exc_block_size") if name in given}
    largest = max(ours, key=ours.__getitem__, default=None)
    blamed = _field(largest, ours[largest]) if largest else f"--block-size {config.block_size}"
    raise ConfigError(
        f"{blamed}: n_init {config.n_init} + n_local {config.n_local} + --block-size {config.block_size} + "
        f"exc_block_size {config.exc_block_size} = {_span(config)} tokens are more than the {trained_len} that the "
        f"model was trained for: lower {' or '.join([*ours, '--block-size'])}."
    )


def _field(name: str, value: Any) -> str:
    return f'--additional-config "{KEY}": {name}={value!r}'
