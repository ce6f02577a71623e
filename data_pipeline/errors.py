"""The errors that end the program with one line: input that cannot be used, and a disk that fails for now. No message of them tells the
secrets of an address."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

REDACTED = "***"
"""Stands where a secret was."""

_ADDRESS = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"'<>]+""")
# `user:password@`: up to the last `@` before a slash; also over slashes, which secret keys may hold, unless it is a port.
# Not `github://owner:repository@version`.
_USER = re.compile(r"(?<!\bgithub)(?<!\bgist)://((?:[^/\s]*|[^/@\s:]*:(?!\d+/)(?:(?!::|://)[^@\s])*))@")
# The container of a storage account, or a login name: without a password behind it, it is no secret.
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
"""Errors that come from a disk, a mount, permissions or a limit, and not from a mistake in the program."""


class DataError(Exception):
    """The user's data or settings are wrong. The message is one line that names the file or setting, its values and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))

    def __str__(self) -> str:
        """One line of printable characters, whatever a file or a column is called."""
        return escape_unprintable(super().__str__())


def escape_unprintable(text: str) -> str:
    """`text` with line breaks, other control characters and bytes that are no Unicode escaped."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks; the name of its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class StorageError(DataError):
    """A disk, a mount or a permission is in the way: exit code 1. It tells nothing about what the files hold.

    The message is one line that names the path, the reason and the way out; the same command may work later.
    """


def unreadable_error(path: object, error: OSError, what: str = "opened") -> StorageError:
    """That a file could not be opened, or read or whatever `what` says. It tells nothing about what the file holds."""
    return StorageError(
        f"{path} cannot be {what} ({error.strerror or error}); nothing is known to be damaged: check the disk or mount, the "
        f"permissions, memory and the limit of open files (`ulimit -n`), and start again"
    )


def redact(text: str) -> str:
    """`text` in which every address has `***` in place of user, password and the values behind `?`; `${NAME}` stays. Again: the same."""
    return _ADDRESS.sub(lambda match: _in_parts(match[0], lambda part, _: REDACTED), text) if "://" in text else text


def find_secrets(address: str) -> set[str]:
    """The literal passwords and values behind `?` of an address; a user without a password is one as well, except where it is a
    container or a login name, as of `abfs` and `ssh`."""
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
        if not colon and _NAMES_A_USER.search(match.string, 0, match.start()):
            return match[0]
        return f"://{put(name, not colon)}{colon}{put(password)}@"

    def query(match: re.Match[str]) -> str:
        pairs = [pair.partition("=") for pair in re.split("([&;])", match[2])]
        return match[1] + "".join(f"{name}={put(value)}" if equals else name for name, equals, value in pairs)

    return _USER.sub(user, _QUERY.sub(query, address, count=1))
