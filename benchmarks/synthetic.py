"""What the worker of a benchmark's engine can do in a step besides the real thing. Lives in the worker's process only.

- "real": nothing is changed.
- "idle": keys and values are written as always, but attention answers zeros; InfLLM also moves blocks to its store as
  always. What is left of a step is vLLM's own time and the linear layers.
- "fill": as "idle", and the model is not run at all: every attention layer gets keys and values that are a function of
  layer and position, the same in both engines. So a long context costs little more than writing it.

The attention that InfLLM sums up for each token is set to a function of the position, so that units get
representatives.
"""

from typing import Any, Literal

import torch

from vllm_infllm.attention.rope import RotaryTable
from vllm_infllm.memory.store import LayerMemory
from vllm_infllm.ops.interface import ExecutionBlocks, LayerSettings, Row

Mode = Literal["real", "idle", "fill"]
PERIOD = 8191
"""Positions after which the synthetic keys and values come again."""


class Synthetic:
    """Switches all attention layers of a model runner, and the model, between the modes."""

    def __init__(self, runner: Any) -> None:
        self.mode: Mode = "real"
        layers = runner.compilation_config.static_forward_context.values()
        for layer in layers:
            self._wrap_attention(layer.impl)
        self._wrap_model(runner, list(layers))

    def _wrap_attention(self, impl: Any) -> None:
        forward = impl.forward
        real = getattr(impl, "ops", None)
        idle = real and IdleOps(real)

        def switched(*args: Any, output: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if real:  # InfLLM: all but attention itself goes on
                impl.ops = real if self.mode == "real" else idle
            elif self.mode != "real":  # stock has written keys and values already
                return output.zero_()
            return forward(*args, output=output, **kwargs)

        impl.forward = switched

    def _wrap_model(self, runner: Any, layers: list[Any]) -> None:
        forward = runner._model_forward
        heads, size, dtype = layers[0].num_kv_heads, layers[0].head_size, runner.model_config.dtype
        content = torch.randn(PERIOD, 2, heads * size, generator=torch.Generator().manual_seed(0)).to(dtype)

        def switched(*, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
            if self.mode != "fill":
                return forward(positions=positions, **inputs)
            query = torch.zeros(len(positions), layers[0].num_heads * size, dtype=dtype)
            for number, layer in enumerate(layers):
                key, value = content[(positions + 97 * number) % PERIOD].unbind(1)
                layer(query, key.contiguous(), value.contiguous())
            return torch.zeros(len(positions), runner.model_config.get_hidden_size(), dtype=dtype)

        runner._model_forward = switched


class IdleOps:
    """Operations that write and seal as `ops` do, and attend to nothing."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def select(self, blocks: ExecutionBlocks, *inputs: Any) -> torch.Tensor:
        return torch.full((len(blocks.rows), blocks.num_chosen), -1, dtype=torch.int64)

    def attend(
        self,
        blocks: ExecutionBlocks,
        settings: LayerSettings,
        rope: RotaryTable,
        query: torch.Tensor,
        cache: torch.Tensor,
        memory: LayerMemory,
        chosen: torch.Tensor,
        slots: torch.Tensor | None,
        output: torch.Tensor,
        mass: torch.Tensor | None,
    ) -> None:
        assert slots is None, "the synthetic fill knows no residency cache"
        block_size = memory.received.shape[2]
        for row in blocks.rows.tolist():
            output[row[Row.OFFSET] : row[Row.OFFSET] + row[Row.END] - row[Row.START]] = 0
            new = slice(row[Row.START] // block_size, -(-row[Row.END] // block_size))
            memory.received[blocks.block_table[row[Row.TABLE], new].long()] = torch.arange(block_size) % 64 / 64
