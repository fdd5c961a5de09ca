"""How all plots of this project look: SVG, one pair of axes, a color a side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_infllm.tools import CommandError

try:
    import matplotlib
except ImportError as error:
    raise CommandError("plots need matplotlib: pip install 'vllm-infllm[bench]'") from error

matplotlib.use("svg")
from matplotlib import pyplot

# The same figures give the same file.
matplotlib.rcParams["svg.hashsalt"] = "vllm-infllm"
COLORS = {"stock": "tab:gray", "infllm": "tab:blue"}


def plot(file: Path, draw: Callable[[Any], None]) -> Path:
    """Let `draw` fill a pair of axes, and write it to `file`."""
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    draw(axes)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file
