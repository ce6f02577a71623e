"""The one error that the data pipeline raises for input it cannot use."""


class DataError(Exception):
    """The user's data or settings are wrong. The message is one line that names the file or setting, its values and the way out."""
