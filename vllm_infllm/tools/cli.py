"""The tools around the plugin. Serving itself is vLLM's: `vllm serve MODEL --attention-backend infllm`."""

import argparse
import sys
from collections.abc import Sequence

from vllm_infllm import __version__
from vllm_infllm.tools import CommandError, demo, doctor, explain, model

# Each command is a module: its docstring is the help, `add_arguments(parser)` its options, `run(args)` its exit status.
COMMANDS = {"model": model, "demo": demo, "doctor": doctor, "explain": explain}


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
    """Run one command. Exit status: the command's own, 1 on a `CommandError`, 2 on wrong usage, 130 on Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"vllm-infllm {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
