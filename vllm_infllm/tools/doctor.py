"""Say what is installed here, and what InfLLM would run on it.

With a model, also the effective configuration and the memory plan of an engine that starts now, without starting one
and without reading weights. The exit status is 0 when `--attention-backend infllm` can start.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_infllm import __version__, plugin
from vllm_infllm.config import ConfigError, InfLLMConfig
from vllm_infllm.memory.plan import GIB
from vllm_infllm.tools.engine_options import add_engine_options, blueprint, engine_options, tokens


@dataclass(frozen=True)
class Finding:
    """One line of the report; what is wrong ends with what to do about it."""

    what: str
    found: str
    wrong: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine to look at, if any."""
    parser.add_argument("--model", help="folder or name of a model to plan for")
    parser.add_argument("--max-model-len", type=tokens, metavar="TOKENS", help="longest request (default: as trained)")
    add_engine_options(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Print all findings, and then the plan."""
    if not args.model and (engine_options(args) or args.infllm or args.max_model_len):
        args.usage_error("options of an engine need --model")
    findings = list(findings_here())
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        text = Text(finding.found)
        if finding.wrong:
            text.append(f"{' ' if finding.found else ''}{finding.wrong}", style="red")
        table.add_row(finding.what, text)
    Console().print(table)
    if any(finding.wrong for finding in findings):
        return 1
    if args.model:
        _print_plan(args)
    return 0


def _print_plan(args: argparse.Namespace) -> None:
    """What a started engine would log, word for word."""
    drawn = blueprint(args.model, args.infllm, max_model_len=args.max_model_len, **engine_options(args))
    model = drawn.vllm_config.model_config
    print(
        f"\n{Path(args.model).name}: {drawn.weight_bytes / GIB:.2f} GiB of weights, {model.dtype}, at most "
        f"{model.max_model_len} tokens a request"
    )
    for line in drawn.layers.startup_lines(drawn.plan):
        print(line)


def findings_here() -> Iterator[Finding]:
    """What is installed on this machine, and what would run."""
    yield Finding("vllm-infllm", __version__)
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    unsupported = plugin.unsupported_vllm()
    yield Finding("vLLM", _version("vllm.version"), unsupported)
    yield Finding("torch", _version("torch"))
    yield _entry_point()
    if unsupported:
        return
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    yield Finding("platform", "CPU" if on_cpu else str(current_platform.device_name))
    yield _extension("C++ kernels", _cpu_kernels, needed=on_cpu)
    if on_cpu:
        # It changes what a token takes by half.
        yield Finding("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "not set"))
    yield Finding("CUDA", _cuda())
    yield Finding("Triton", _version("triton"))
    yield _extension("CUDA kernels", _cuda_kernels, needed=not on_cpu)
    yield _would_run()


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return "not installed"


def _entry_point() -> Finding:
    """vLLM loads the plugin by its entry point."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "infllm" in names:
        return Finding("plugin", "installed")
    return Finding("plugin", "", "vLLM would not find it: install vllm-infllm with pip where vLLM is installed.")


def _extension(what: str, describe: Callable[[], str], needed: bool) -> Finding:
    """An extension that is missing is wrong where it is needed, and told elsewhere."""
    try:
        return Finding(what, describe())
    except ConfigError as error:
        return Finding(what, "", str(error)) if needed else Finding(what, "not installed, not needed here")


def _cpu_kernels() -> str:
    from vllm_infllm.ops import cpu

    return f"{cpu.describe()}; this machine could run {', '.join(cpu.isas())}"


def _cuda_kernels() -> str:
    from vllm_infllm.ops import cuda  # noqa: F401  refuses to be imported without its extension

    return "loaded"


def _cuda() -> str:
    """What torch was built for, and the device and driver that it finds."""
    import torch

    if torch.version.cuda is None:
        return "torch is built without it"
    if not torch.cuda.is_available():
        return f"torch is built for {torch.version.cuda} and finds no device and driver"
    major, minor = torch.cuda.get_device_capability()
    return (
        f"torch is built for {torch.version.cuda}; {torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    )


def _would_run() -> Finding:
    """The operations that a default configuration runs."""
    from vllm_infllm import ops

    try:
        return Finding("operations", ops.load(plugin.chosen_ops(InfLLMConfig())).describe())
    except ConfigError as error:
        return Finding("operations", "", str(error))
