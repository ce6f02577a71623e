"""The error for a layout that cannot work. The program prints its message as one line and exits with code 2."""


class LayoutError(Exception):
    """A layout that cannot work. The message names the settings and their values, and says what to change."""
