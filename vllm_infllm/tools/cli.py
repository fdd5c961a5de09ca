"""The tools around the plugin. Serving itself is vLLM's: `vllm serve MODEL --attention-backend infllm`."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence

from vllm_infllm import __version__
from vllm_infllm.tools import CommandError, bench, demo, doctor, explain, model, tune
from vllm_infllm.tools.eval import command as evaluate

# Each command is a module: its docstring is the help, `add_arguments(parser)` its options, `run(args)` its exit status.
COMMANDS = {
    "model": model,
    "demo": demo,
    "eval": evaluate,
    "doctor": doctor,
    "explain": explain,
    "bench": bench,
    "tune": tune,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, one sub-parser a command."""
    parser = argparse.ArgumentParser(prog="vllm-infllm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: the command's own, a `CommandError`'s (2 on wrong usage, else 1), 130 on Ctrl-C and
    where it is told to end."""
    args = build_parser().parse_args(argv)
    try:
        with ended_like_interrupted():
            return args.run(args)
    except CommandError as error:
        print(f"vllm-infllm {args.command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """A signal to end works like Ctrl-C, so that what a command has started ends, too."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
