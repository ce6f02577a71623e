"""The one error that the data pipeline raises for input it cannot use."""


class DataError(Exception):
    """The user's data or settings are wrong. The message is one line that names the file or setting, its values and the way out."""

    def __str__(self) -> str:
        """One line of printable characters, whatever a file or a column is called."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """`text` with line breaks, other control characters and bytes that are no Unicode escaped."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
