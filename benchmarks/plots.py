"""The plots of performance.md, as SVG."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results
from vllm_infllm.tools.plotting import COLORS, plot


def draw(parts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what was measured into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        plot(folder / f"{name}.svg", partial(draw_part, parts[name]))
        for name, draw_part in (("prefill", _prefill), ("decode", _decode))
        if name in parts
    ]


def _prefill(samples: Mapping[str, Any], axes: Any) -> None:
    for side, color in COLORS.items():
        steps = sorted(results.steps(samples["steps"][side]))
        xs, ys = [step.middle / 1024 for step in steps], [step.density * 1000 for step in steps]
        axes.plot(xs, ys, marker=".", color=color, label=side)
    axes.set_xlabel("position in the prompt, 1,024 tokens")
    axes.set_ylabel("seconds for 1,000 tokens")


def _decode(samples: Mapping[str, Any], axes: Any) -> None:
    xs = [int(context) / 1024 for context in samples]
    for mode, style in (("real", "-"), ("idle", ":")):
        for side, color in COLORS.items():
            blocks = [results.step_seconds(by_side[side][mode]) or [float("nan")] for by_side in samples.values()]
            label = side if mode == "real" else f"{side} without attention"
            axes.plot(xs, [median(b) * 1e3 for b in blocks], style, marker=".", color=color, label=label)
    axes.set_xlabel("context, 1,024 tokens")
    axes.set_ylabel("milliseconds a token")
