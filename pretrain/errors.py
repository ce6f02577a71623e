"""What ends the program with one line instead of a traceback. `cli.main` prints it and chooses the exit code."""


class UserError(Exception):
    """A wrong input: exit code 2. The message names the setting or file, carries the values, and says the way out."""


class Diverged(Exception):
    """A loss or gradient stopped being finite: exit code 1. The weights are those of the step before."""
