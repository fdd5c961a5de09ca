"""The drawings of concepts.md, as SVG: `python -m docs.drawings` writes them into docs/drawings.

Every border that they show is computed by `Geometry`, the formulas that the plugin runs. Which units are retrieved is
made up: that takes keys and queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.patches import Patch

from vllm_infllm.config import InfLLMConfig
from vllm_infllm.memory.geometry import Geometry

FOLDER = Path(__file__).parent / "drawings"
# The same figures give the same file; text stays text.
STYLE = {"svg.hashsalt": "vllm-infllm", "svg.fonttype": "none", "font.size": 9}
COLORS = {
    "initial": "#4c72b0",
    "retrieved": "#dd8452",
    "remainder": "#937860",
    "local": "#55a868",
    "sealed, not retrieved": "#e4e4e4",
}
SMALL = Geometry(block_size=128, n_init=128, n_local=1024, exc_block_size=512)
"""Small enough that single units can be seen."""


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) that a query sees, and as which part."""

    part: str
    start: int
    end: int


def seen(geometry: Geometry, s: int, t: int, chosen: Sequence[int]) -> list[Span]:
    """What query t of an execution block that starts at token s sees, given the sealed units that were chosen."""
    window = max(0, t - geometry.n_local + 1)
    unsealed = unit_start(geometry, geometry.sealed_units(s))
    spans = [
        Span("initial", 0, min(geometry.n_init, window)),
        *(Span("retrieved", unit_start(geometry, u), unit_start(geometry, u + 1)) for u in sorted(chosen)),
        Span("remainder", unsealed, window),
        Span("local", window, t + 1),
    ]
    return [span for span in spans if span.start < span.end]


def unit_start(geometry: Geometry, unit: int) -> int:
    """First token of a unit."""
    return geometry.n_init + unit * geometry.block_size


def ranges(axes: Any) -> None:
    """Three queries, and the tokens that each of them sees."""
    prefill, decode = 3072, 3700
    chosen = [2, 5, 6, 11]
    end = prefill + SMALL.exc_block_size
    rows = [
        (f"prompt: execution block [{prefill}, {end}),\nits first query, t = {prefill}", prefill, prefill),
        (f"its last query, t = {end - 1}", prefill, end - 1),
        (f"an answer token, t = {decode}", decode, decode),
    ]
    for row, (_, s, t) in enumerate(rows):
        for unit in range(SMALL.sealed_units(s)):
            _bar(axes, row, Span("sealed, not retrieved", unit_start(SMALL, unit), unit_start(SMALL, unit + 1)))
        for span in seen(SMALL, s, t, chosen):
            _bar(axes, row, span)
        axes.plot([t + 1, t + 1], [row - 0.42, row + 0.42], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, decode + 60)
    axes.set_xticks(range(0, decode, 512))
    axes.set_xlabel("token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=_legend(), ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)


def mask(axes: Any) -> None:
    """All queries of a prompt, all tokens: which part each pair belongs to."""
    geometry, length, topk = Geometry(64, 64, 512, 256), 2048, 2
    for s, e in geometry.execution_blocks(0, length, length):
        sealed = geometry.sealed_units(s)
        # Made up: something else for every execution block, all of them while there is no choice.
        chosen = range(sealed) if sealed <= topk else sorted({s * 7 // 256 % sealed, s * 3 // 256 % (sealed - 1) + 1})
        for unit in range(sealed):
            span = Span("sealed, not retrieved", unit_start(geometry, unit), unit_start(geometry, unit + 1))
            axes.fill_betweenx([s, e], span.start, span.end, color=COLORS[span.part], linewidth=0)
        for part in ("initial", "retrieved", "remainder", "local"):
            _strips(axes, part, [(t, seen(geometry, s, t, list(chosen))) for t in range(s, e)])
    axes.set_xlim(0, length)
    axes.set_ylim(length, 0)
    axes.set_aspect("equal")
    ticks = range(0, length + 1, geometry.exc_block_size)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("token that is seen")
    axes.set_ylabel("query")
    axes.legend(handles=_legend(), loc="upper right", frameon=False)


def distances(axes: Any) -> None:
    """The distance at which the model sees a token."""
    n_local, furthest = SMALL.n_local, 4 * SMALL.n_local
    xs = [0, n_local - 1, n_local, furthest]
    axes.plot(xs[:2], xs[:2], color=COLORS["local"], linewidth=2, label="local: the true distance")
    axes.plot(xs[2:], [n_local - 1] * 2, color=COLORS["retrieved"], linewidth=2, label="all others: n_local - 1")
    axes.plot([0, furthest], [0, furthest], ":", color="gray", label="full attention")
    axes.set_xlim(0, furthest)
    axes.set_ylim(0, 2 * n_local)
    axes.set_xticks(range(0, furthest + 1, n_local))
    axes.set_yticks([0, n_local, 2 * n_local], ["0", "n_local", "2 n_local"])
    axes.set_xticklabels(["0", "n_local", "2 n_local", "3 n_local", "4 n_local"])
    axes.set_xlabel("distance in the text")
    axes.set_ylabel("distance that the model sees")
    axes.legend(frameon=False)


def memory(axes: Any) -> None:
    """What a growing request holds, in blocks, in the default configuration."""
    config, step, longest = InfLLMConfig(), 2048, 32768
    lengths = range(0, longest + 1, config.block_size)
    paged, stored, full = zip(*(held(config, length, step) for length in lengths), strict=True)
    axes.plot(lengths, full, ":", color="gray", label="full attention, KV cache")
    axes.plot(lengths, stored, color=COLORS["retrieved"], label="InfLLM, host memory")
    axes.plot(lengths, paged, color=COLORS["local"], linewidth=2, label="InfLLM, KV cache, at most")
    axes.set_xlim(0, longest)
    axes.set_ylim(0)
    axes.set_xticks(range(0, longest + 1, 4096), [f"{length // 1024}K" for length in range(0, longest + 1, 4096)])
    axes.set_xlabel("tokens of the request")
    axes.set_ylabel("blocks of 128 tokens")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def held(config: InfLLMConfig, length: int, tokens_per_step: int) -> tuple[int, int, int]:
    """Blocks that a request of `length` tokens holds: paged, at most; in host memory; paged with full attention."""
    geometry = config.geometry
    full = -(-length // config.block_size)
    return min(full, config.kept_blocks + geometry.window_blocks(tokens_per_step)), geometry.stored_blocks(length), full


DRAWINGS: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "ranges": (ranges, (9.0, 2.6)),
    "mask": (mask, (5.5, 5.0)),
    "distances": (distances, (5.5, 3.0)),
    "memory": (memory, (5.5, 3.0)),
}


def draw(folder: Path) -> list[Path]:
    """Write all drawings into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (draw_one, size) in DRAWINGS.items():
        with matplotlib.rc_context(STYLE):
            figure, axes = pyplot.subplots(figsize=size, layout="constrained")
            draw_one(axes)
            files.append(folder / f"{name}.svg")
            figure.savefig(files[-1], metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
    return files


def _bar(axes: Any, row: int, span: Span) -> None:
    axes.barh(
        row,
        span.end - span.start,
        left=span.start,
        height=0.6,
        color=COLORS[span.part],
        edgecolor="white",
        linewidth=0.5,
    )


def _strips(axes: Any, part: str, rows: list[tuple[int, list[Span]]]) -> None:
    """One part of consecutive queries: its n-th span in every row makes one area, drawn by its corners."""
    spans = [(t, [span for span in row if span.part == part]) for t, row in rows]
    for n in range(max(len(row) for _, row in spans)):
        lines = [(t, row[n].start, row[n].end) for t, row in spans if n < len(row)]
        last = (lines[-1][0] + 1, *lines[-1][1:])
        corners = [
            line
            for before, line, after in zip(lines, lines[1:], lines[2:], strict=False)
            if _bends(before, line, after)
        ]
        ts, starts, ends = zip(lines[0], *corners, last, strict=True)
        axes.fill_betweenx(ts, starts, ends, color=COLORS[part], linewidth=0)


def _bends(before: tuple[int, ...], line: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return any(b - a != c - b for a, b, c in zip(before, line, after, strict=True))


def _legend() -> list[Patch]:
    return [Patch(color=color, label=part) for part, color in COLORS.items()]


if __name__ == "__main__":
    for file in draw(FOLDER):
        print(file)
