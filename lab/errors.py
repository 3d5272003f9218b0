"""How a stage may end other than well; cli.py turns each into one line and an exit code."""


class UserError(Exception):
    """Something the user can put right. Scripts print it as one line and exit with code 2."""


class Stopped(Exception):
    """The user or the system asked the stage to stop; its state is saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class Diverged(Exception):
    """Training met a loss that is not finite."""
