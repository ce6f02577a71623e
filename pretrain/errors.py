"""What the user did wrong, in one line. `cli.main` turns it into exit code 2."""


class UserError(Exception):
    """A wrong input. The message names the setting or file, carries the values, and says the way out."""
