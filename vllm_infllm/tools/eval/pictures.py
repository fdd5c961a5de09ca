"""The pictures of an evaluation: needle heat maps, score against length, perplexity against position."""

from collections.abc import Sequence
from math import exp, isnan
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from vllm_infllm.tools.eval.results import Record
from vllm_infllm.tools.eval.tasks.perplexity import BIN
from vllm_infllm.tools.sides import BACKENDS

COLORS = {"infllm": "tab:blue", "streaming": "tab:orange", "full": "tab:gray", "server": "tab:green"}
RULE_COLORS = ("tab:brown", "tab:olive", "tab:pink", "tab:cyan", "tab:red", "tab:purple", "black")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what there is into `folder`, as PNG; returns the files."""
    files = []
    for task in dict.fromkeys(record.task for record in records):
        of_task = [record for record in records if record.task == task]
        if of_task[0].nll:
            files.append(_perplexity(of_task, folder / f"{task}.png"))
            continue
        files.append(_lengths(of_task, folder / f"{task}-lengths.png"))
        for backend in dict.fromkeys(record.backend for record in of_task):
            of_backend = [record for record in of_task if record.backend == backend]
            if of_backend[0].depth is not None:
                files.append(_heat_map(of_backend, folder / f"{task}-{backend}.png"))
    return files


def grid(records: Sequence[Record]) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths, and mean scores [depths][lengths], NaN where there is none."""
    lengths = sorted({record.length for record in records})
    depths = sorted({record.depth for record in records if record.depth is not None})
    cells = [
        [
            [r.score for r in records if (r.depth, r.length) == (depth, length) and r.score is not None]
            for length in lengths
        ]
        for depth in depths
    ]
    return lengths, depths, [[mean(cell) if cell else float("nan") for cell in row] for row in cells]


def _heat_map(records: Sequence[Record], file: Path) -> Path:
    lengths, depths, cells = grid(records)
    figure, axes = pyplot.subplots(figsize=(2 + 0.9 * len(lengths), 1.6 + 0.4 * len(depths)), layout="constrained")
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
    for y, row in enumerate(cells):
        for x, score in enumerate(row):
            if not isnan(score):
                axes.text(x, y, f"{100 * score:.0f}", ha="center", va="center")
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{records[0].task}, {records[0].backend}")
    figure.colorbar(image, label="score")
    return _save(figure, file)


def _lengths(records: Sequence[Record], file: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for backend in dict.fromkeys(record.backend for record in records):
        lengths = sorted({record.length for record in records if record.backend == backend})
        means = [
            100 * mean(r.score for r in records if (r.backend, r.length) == (backend, length) and r.score is not None)
            for length in lengths
        ]
        axes.plot(lengths, means, marker="o", label=backend, **_style(backend))
    axes.set_xscale("log", base=2)
    ticks = sorted({record.length for record in records})
    axes.set_xticks(ticks, [_tokens(length) for length in ticks])
    axes.set_ylim(-2, 102)
    axes.set_xlabel("tokens")
    axes.set_ylabel("score of 100")
    axes.set_title(records[0].task)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, file)


def _perplexity(records: Sequence[Record], file: Path) -> Path:
    """One line a backend, from its longest prompts."""
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    longest = max(record.length for record in records)
    for backend in dict.fromkeys(record.backend for record in records):
        curves = [r.nll for r in records if r.backend == backend and r.length == longest and r.nll]
        points = [exp(mean(values)) for values in zip(*curves, strict=True)]
        positions = [(i + 0.5) * BIN for i in range(len(points))]
        axes.plot(positions, points, label=backend, **_style(backend))
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, file)


def _style(backend: str) -> dict[str, str]:
    """A color of its own; selection rules are dashed, so that what lies under them can be seen."""
    rules = [name for name in BACKENDS if name.startswith("infllm-")]
    if backend in rules:
        return {"color": RULE_COLORS[rules.index(backend) % len(RULE_COLORS)], "linestyle": "--"}
    return {"color": COLORS.get(backend, COLORS["server"])}


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file
