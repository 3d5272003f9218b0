"""Exceptions with their own exit code (utils/cli.py).

In this project, functions raise UserError for problems that the user can fix, such as a missing file or a wrong setting.
Scripts print it as one line and exit with code 2. Docstrings mention UserError only if the condition is not obvious.
"""


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what is wrong, the value, how to fix it."""


class Stopped(Exception):
    """A signal stopped the script after it had saved its state."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class Diverged(Exception):
    """The loss or its gradient is not finite."""


class ProcessLost(Exception):
    """Another process of this run ended or cannot be reached."""
