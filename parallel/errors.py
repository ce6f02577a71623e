"""What is wrong with a layout: the program ends with one line and exit code 2."""


class LayoutError(Exception):
    """A layout that cannot be. The message names the settings, carries the values, and says the way out."""
