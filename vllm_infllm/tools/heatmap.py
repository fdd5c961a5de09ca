"""The picture of a trace: which part of the text was retrieved when."""

from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure

from vllm_infllm.memory.trace import Trace


def layers_by_block_and_unit(trace: Trace) -> Any:
    """[blocks, units] int: how many layers retrieved each unit for each execution block."""
    units = max((trace.sealed_units(block) for block in trace.blocks), default=0)
    counts: Any = numpy.zeros((len(trace.blocks), units), dtype=int)
    for row, block in enumerate(trace.blocks):
        for retrieved in block.units:
            counts[row, retrieved] += 1
    return counts


def draw(trace: Trace, prompt_len: int, file: Path) -> None:
    """Write the heat map as PNG. The text runs to the right; execution blocks follow one another downwards."""
    counts = layers_by_block_and_unit(trace)
    blocks, units = counts.shape
    end = trace.tokens_of(units).start
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        counts,
        extent=(trace.n_init, end, blocks, 0),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=len(trace.layers),
    )
    figure.colorbar(image, label=f"layers that retrieved the unit, of {len(trace.layers)}")
    # What lies to the right of this line could not be retrieved yet: window, remainder, future.
    border = [trace.tokens_of(trace.sealed_units(block)).start for block in trace.blocks]
    axes.stairs(border, range(blocks + 1), orientation="horizontal", baseline=None, color="white", linewidth=1)
    answer = next((row for row, block in enumerate(trace.blocks) if block.start >= prompt_len - 1), blocks)
    axes.axhline(answer, color="tab:red", linewidth=1)
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("execution block (answer below the red line)")
    figure.savefig(file, dpi=120)
