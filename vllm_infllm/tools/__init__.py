"""The command line: prepare the demo model, show the plugin at work."""


class CommandError(Exception):
    """What a command cannot do, said so that its user knows what to change; shown without a traceback."""
