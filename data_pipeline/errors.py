"""The one error that the data pipeline raises for input it cannot use. No message of it tells the secrets of an address."""

from __future__ import annotations

import re
from collections.abc import Callable

HIDDEN = "***"
"""Stands where a secret was."""

_ADDRESS = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"'<>]+""")
# `user:password@`: up to the last `@` before a slash; also over slashes, which secret keys may hold, unless it is a port.
# Not `github://owner:repository@version`.
_USER = re.compile(r"(?<!\bgithub)(?<!\bgist)://((?:[^/\s]*|[^/@\s:]*:(?!\d+/)(?:(?!::|://)[^@\s])*))@")
_QUERY = re.compile(r"(\?(?=[^/?&]*=))(.+)")  # another `?` is a wildcard
_ONLY_VARIABLES = re.compile(r"(\$\{[A-Za-z_][A-Za-z0-9_]*\})*")


class DataError(Exception):
    """The user's data or settings are wrong. The message is one line that names the file or setting, its values and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))

    def __str__(self) -> str:
        """One line of printable characters, whatever a file or a column is called."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """`text` with line breaks, other control characters and bytes that are no Unicode escaped."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def redact(text: str) -> str:
    """`text` in which every address has `***` in place of user, password and the values behind `?`; `${NAME}` stays. Again: the same."""
    return _ADDRESS.sub(lambda match: _in_parts(match[0], lambda part, _: HIDDEN), text) if "://" in text else text


def secret_parts(address: str) -> set[str]:
    """The literal passwords and values behind `?` of an address; a user without a password is one as well."""
    found: set[str] = set()

    def note(part: str, is_secret: bool) -> str:
        found.update([part] if is_secret else [])
        return part

    for match in _ADDRESS.finditer(address):
        _in_parts(match[0], note)
    return found


def _in_parts(address: str, instead: Callable[[str, bool], str]) -> str:
    """Put `instead(part, whether it is secret)` in place of each literal part of user, password and the values behind `?`."""

    def put(part: str, is_secret: bool = True) -> str:
        return part if not part or _ONLY_VARIABLES.fullmatch(part) else instead(part, is_secret)

    def user(match: re.Match[str]) -> str:
        name, colon, password = match[1].partition(":")
        return f"://{put(name, not colon)}{colon}{put(password)}@"

    def query(match: re.Match[str]) -> str:
        pairs = [pair.partition("=") for pair in re.split("([&;])", match[2])]
        return match[1] + "".join(f"{name}={put(value)}" if equals else name for name, equals, value in pairs)

    return _USER.sub(user, _QUERY.sub(query, address, count=1))
