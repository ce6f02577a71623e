"""What ends the program with one line instead of a traceback. `cli.main` prints it and chooses the exit code."""

from data_pipeline.errors import redact


class UserError(Exception):
    """A wrong input: exit code 2. The message names the setting or file, shows its value without secrets, and says what
    to change."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class Diverged(Exception):
    """A loss or gradient stopped being finite: exit code 1. The weights are those of the step before."""
