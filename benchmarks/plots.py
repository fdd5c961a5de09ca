"""The plots of performance.md, as SVG."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks import results

# The same figures give the same file.
matplotlib.rcParams["svg.hashsalt"] = "vllm-infllm"
COLORS = {"stock": "tab:gray", "infllm": "tab:blue"}


def draw(parts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what was measured into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw_part in (("prefill", _prefill), ("decode", _decode)):
        if name not in parts:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        draw_part(parts[name], axes)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        files.append(folder / f"{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
        pyplot.close(figure)
    return files


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
