"""The errors that end the program with a one-line message: unusable input, and failing storage. Their messages contain
no secrets of addresses."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

REDACTED = "***"
"""Replaces a secret."""

_ADDRESS = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"'<>]+""")
# `user:password@`. Ends at the last `@` before a slash. A password may contain slashes, unless it looks like a port.
# Does not match `github://owner:repository@version`.
_USER = re.compile(r"(?<!\bgithub)(?<!\bgist)://((?:[^/\s]*|[^/@\s:]*:(?!\d+/)(?:(?!::|://)[^@\s])*))@")
# Schemes in which `name@` without a password is a container of a storage account or a login name, not a secret.
_NAMES_A_USER = re.compile(r"\b(?:abfss?|wasbs?|sftp|ssh|ftp|hdfs)$", re.IGNORECASE)
_QUERY = re.compile(r"(\?(?=[^/?&]*=))(.+)")  # another `?` is a wildcard
_ONLY_VARIABLES = re.compile(r"(\$\{[A-Za-z_][A-Za-z0-9_]*\})*")

DISK_ERRNOS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(
            errno.EIO,
            errno.ESTALE,
            errno.ENOTCONN,
            errno.ENODEV,
            errno.ENXIO,
            errno.ETIMEDOUT,
            errno.EHOSTDOWN,
            errno.EREMOTEIO,
        ),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBUSY, errno.ELOOP),
    }
)
"""Errors caused by a disk, a mount, permissions or a limit, not by a bug in the program."""


class DataError(Exception):
    """The user's data or settings are wrong. The message is one line: the file or setting, its values, a remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))

    def __str__(self) -> str:
        """Return the message as one line of printable characters, whatever the names of files and columns contain."""
        return escape_unprintable(super().__str__())


def escape_unprintable(text: str) -> str:
    """Escape line breaks, other control characters and bytes that are not Unicode."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(error: BaseException) -> str:
    """Return the message of an exception without line breaks, or the name of its class if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


class StorageError(DataError):
    """A disk, a mount or a permission prevents reading or writing: exit code 1. Says nothing about the files' contents.

    The message is one line with the path, the reason and a remedy. The same command may work later.
    """


def unreadable_error(path: object, error: OSError, what: str = "opened") -> StorageError:
    """Return the error for a file that could not be opened, or read, or whatever `what` says."""
    return StorageError(
        f"{path} cannot be {what} ({error.strerror or error}); nothing is known to be damaged: check the disk or "
        "mount, the permissions, memory and the limit of open files (`ulimit -n`), and start again"
    )


def redact(text: str) -> str:
    """Replace user, password and query values by `***` in every address in a text. Keeps `${NAME}`. Idempotent."""
    return (
        _ADDRESS.sub(lambda match: _replace_parts(match[0], lambda part, _: REDACTED), text) if "://" in text else text
    )


def find_secrets(address: str) -> set[str]:
    """Return the literal secrets of an address: passwords, the query's values, and users without a password. The last
    are not secret in schemes such as `abfs` and `ssh`, where they are a container or a login name."""
    found: set[str] = set()

    def collect(part: str, is_secret: bool) -> str:
        found.update([part] if is_secret else [])
        return part

    for match in _ADDRESS.finditer(address):
        _replace_parts(match[0], collect)
    return found


def _replace_parts(address: str, replacement: Callable[[str, bool], str]) -> str:
    """Replace user, password and query values, unless they are variables, by `replacement(part, is_secret)`."""

    def replace(part: str, is_secret: bool = True) -> str:
        return part if not part or _ONLY_VARIABLES.fullmatch(part) else replacement(part, is_secret)

    def user(match: re.Match[str]) -> str:
        name, colon, password = match[1].partition(":")
        if not colon and _NAMES_A_USER.search(match.string, 0, match.start()):
            return match[0]
        return f"://{replace(name, not colon)}{colon}{replace(password)}@"

    def query(match: re.Match[str]) -> str:
        pairs = [pair.partition("=") for pair in re.split("([&;])", match[2])]
        return match[1] + "".join(f"{name}={replace(value)}" if equals else name for name, equals, value in pairs)

    return _USER.sub(user, _QUERY.sub(query, address, count=1))
