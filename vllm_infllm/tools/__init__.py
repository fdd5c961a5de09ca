"""The command line: prepare the demo model, show the plugin at work, evaluate it."""


class CommandError(Exception):
    """What a command cannot do, said so that its user knows what to change; shown without a traceback."""

    status = 1
    """The exit status of the command."""


class UsageError(CommandError):
    """What was asked for makes no sense: found before anything was started or written."""

    status = 2
