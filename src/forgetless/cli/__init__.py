"""The command line: one verb a stage, each of which calls one function.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
A user's mistake is one line on standard error and exit code 2; a run that failed is exit code 1.
"""

from forgetless.cli.process import STOPPED, main

__all__ = ["STOPPED", "main"]
