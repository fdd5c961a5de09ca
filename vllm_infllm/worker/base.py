"""What InfLLM adds to a worker: rotary tables are bound and extended when the model has been loaded, and the memory
plan is made when its layers are known."""

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_infllm import __version__, selection, stopping
from vllm_infllm.attention import rope
from vllm_infllm.attention.backend import InfLLMImpl
from vllm_infllm.config import KEY, ConfigError, InfLLMConfig
from vllm_infllm.memory.manager import InfLLMSpec
from vllm_infllm.memory.plan import MemoryPlan, MemorySizes, make_plan
from vllm_infllm.selection import SummaryRule
from vllm_infllm.selection.rules import UnitShape
from vllm_infllm.worker.stack import with_stack_room

logger = init_logger(f"vllm.{__name__}")
ROPES = "vllm.model_executor.layers.rotary_embedding"


def infllm_impls(vllm_config: VllmConfig) -> dict[str, InfLLMImpl]:
    """The layers of the loaded model that run InfLLM, by name."""
    layers = vllm_config.compilation_config.static_forward_context
    return {n: layer.impl for n, layer in layers.items() if isinstance(getattr(layer, "impl", None), InfLLMImpl)}


def bind_rope(model: torch.nn.Module, vllm_config: VllmConfig) -> None:
    """Extend the rotary tables of all attention layers to max_model_len, and hand each InfLLM layer its own.

    Raises:
        ConfigError: if a table cannot be extended, or a layer's rotary module cannot be told.
    """
    impls = infllm_impls(vllm_config)
    modules = dict(model.named_modules())
    beside = {
        name: [child for child in modules[name.rpartition(".")[0]].children() if is_rope(child)]
        for name in vllm_config.compilation_config.static_forward_context
        if name.rpartition(".")[0] in modules
    }
    for name in impls:
        ropes = beside.get(name, [])
        if len(ropes) != 1:
            raise ConfigError(
                f"InfLLM needs rotary positions, and layer {name} has {len(ropes)} rotary modules beside it: models "
                "with learned absolute positions or without positions are not supported; remove --attention-backend "
                "infllm."
            )
        rope.check_supported(ropes[0])
    for module in itertools.chain.from_iterable(beside.values()):
        rope.extend(module, vllm_config.model_config.max_model_len)
    tables: dict[torch.nn.Module, rope.RotaryTable] = {}
    for name, impl in impls.items():
        (module,) = beside[name]
        if module not in tables:
            tables[module] = rope.RotaryTable(module.cos_sin_cache.float(), module.is_neox_style)
        impl.rope = tables[module]


def is_rope(module: torch.nn.Module) -> bool:
    """Whether it is a rotary module of vLLM; not all of them share a base class."""
    return type(module).__module__.startswith(ROPES) and "RotaryEmbedding" in type(module).__name__


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model whose attention layers are known, with or without its weights: what the memory plan and the
    startup lines are made of."""

    vllm_config: VllmConfig
    config: InfLLMConfig
    specs: dict[str, KVCacheSpec]
    """Of all layers by name; those of the InfLLM layers are `InfLLMSpec`s without units."""
    sizes: MemorySizes

    @classmethod
    def of(cls, specs: dict[str, KVCacheSpec], vllm_config: VllmConfig) -> "ModelLayers":
        """From vLLM's own specs.

        Raises:
            ConfigError: if there is no layer that InfLLM could run, or one that it cannot.
        """
        impls = infllm_impls(vllm_config)
        _check_layers(specs, impls, vllm_config)
        config = InfLLMConfig(**vllm_config.additional_config[KEY])
        specs = {name: InfLLMSpec.of(spec, config) if name in impls else spec for name, spec in specs.items()}
        return cls(vllm_config, config, specs, memory_sizes(specs, impls, vllm_config))

    def plan(
        self, total_memory: int, free_memory: int, paged_bytes: int | None, shares_host_memory: bool
    ) -> MemoryPlan:
        """The memory plan; arguments and errors as of `make_plan`."""
        return make_plan(
            self.config,
            self.sizes,
            self.vllm_config.scheduler_config.max_num_seqs,
            self.vllm_config.model_config.max_model_len,
            total_memory,
            free_memory,
            paged_bytes,
            shares_host_memory,
        )

    def startup_lines(self, plan: MemoryPlan) -> list[str]:
        """Version, effective configuration and memory plan; the layers that run InfLLM."""
        effective = self.config.model_dump(exclude_none=True)
        settings = " ".join(f"{key}={value}" for key, value in effective.items())
        ours = [name for name, spec in self.specs.items() if isinstance(spec, InfLLMSpec)]
        others = [name for name in self.specs if name not in ours]
        operations = next(iter(infllm_impls(self.vllm_config).values())).ops.describe()
        beside = f"; the platform's own backend runs {_abbreviate(others)}" if others else ""
        return [
            f"vllm-infllm {__version__}: {settings}; operations: {operations}; {plan}",
            f"InfLLM runs {len(ours)} of {len(self.specs)} attention layers: {_abbreviate(ours)}{beside}",
        ]


class InfLLMWorker:
    """Mixin for a worker of vLLM."""

    vllm_config: VllmConfig
    model_runner: Any
    _shares_host_memory: bool
    sizes: MemorySizes
    plan: MemoryPlan

    def load_model(self, **kwargs: Any) -> None:
        stopping.end_with_engine_core()
        super().load_model(**kwargs)  # type: ignore[misc]
        bind_rope(self.model_runner.get_model(), self.vllm_config)

    @with_stack_room
    def execute_model(self, scheduler_output: Any) -> Any:
        """A step, as vLLM runs it."""
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, with those of the InfLLM layers replaced, and the memory plan in them."""
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        layers = ModelLayers.of(specs, self.vllm_config)
        self.sizes = layers.sizes
        self.plan = layers.plan(*self._host_memory(), self._user_paged_bytes(), self._shares_host_memory)
        for line in layers.startup_lines(self.plan):
            logger.info("%s", line)
        return {
            name: replace(spec, num_units=self.plan.num_units) if isinstance(spec, InfLLMSpec) else spec
            for name, spec in layers.specs.items()
        }

    @abstractmethod
    def _host_memory(self) -> tuple[int, int]:
        """Bytes of host memory that this process may use: all, and what is free."""

    def _user_paged_bytes(self) -> int | None:
        return self.vllm_config.cache_config.kv_cache_memory_bytes


def _check_layers(specs: dict[str, KVCacheSpec], impls: dict[str, InfLLMImpl], vllm_config: VllmConfig) -> None:
    if not impls:
        raise ConfigError(
            f"--attention-backend infllm: model {vllm_config.model_config.model} has no full causal attention layer "
            "that InfLLM could run (encoder-only, or sliding windows only); remove the flag."
        )
    for name in impls:
        if type(specs.get(name)) is not FullAttentionSpec:
            raise ConfigError(
                f"--attention-backend infllm: layer {name} is not plain full causal attention "
                f"({type(specs.get(name)).__name__}); remove the flag."
            )


def memory_sizes(specs: dict[str, KVCacheSpec], impls: dict[str, InfLLMImpl], vllm_config: VllmConfig) -> MemorySizes:
    """What one request needs; `specs` of all layers, `impls` of those that run InfLLM."""
    ours = [(specs[name], impl) for name, impl in impls.items()]
    in_flight, max_len = vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
    blocks = max(spec.max_admission_blocks_per_request(in_flight, max_len) for spec, _ in ours)
    return MemorySizes(
        blocks_per_request=blocks,
        paged_request=sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs.values()),
        received_request=sum(blocks * impl.num_heads * spec.block_size * 4 for spec, impl in ours),
        unit=sum(spec.page_size_bytes for spec, _ in ours),
        representative=sum(_vectors(impl) * impl.head_size * spec.dtype.itemsize for spec, impl in ours),
    )


def _vectors(impl: InfLLMImpl) -> int:
    """Vectors [D] kept of a unit in a layer: its representatives, and its summary by another selection rule."""
    rule, config = selection.load(impl.config.selection), impl.config
    shape = UnitShape(impl.num_heads, impl.num_kv_heads, config.block_size, config.repr_topk)
    return impl.num_heads + (rule.num_vectors(shape) if isinstance(rule, SummaryRule) else 0)


def _abbreviate(names: list[str]) -> str:
    return ", ".join(_spans(names))


def _spans(names: list[str]) -> Iterator[str]:
    """Layer names with runs of numbers drawn together: model.layers.[0-29].self_attn.attn."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            yield name
            continue
        key = (".".join(parts[:place]), ".".join(parts[place + 1 :]))
        groups.setdefault(key, []).append(int(parts[place]))
    for (head, tail), numbers in groups.items():
        yield f"{head}.[{_runs(sorted(numbers))}].{tail}"


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
