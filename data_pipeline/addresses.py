"""Addresses of files and their secrets: `s3://key:secret@host/x`, `https://host/x?token=...`, environment variables.

Text that is written or shown has `***` in place of secrets, and keeps `${NAME}`. Only opening a file expands variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote

from data_pipeline.errors import REDACTED, DataError, find_secrets, redact

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_WILDCARD = re.compile(r"[*?\[]")
"""Ends the prefix that all files of a glob share."""

SOURCES_SETTING = "data.sources"
"""The setting that errors name. `redacting_errors` replaces it by another one."""

_MIN_SECRET = 4
"""Length of the shortest secret that is searched for in texts. Shorter ones would be found in any text."""


def expand_variables(address: str, setting: str = SOURCES_SETTING, environment: Mapping[str, str] = os.environ) -> str:
    """Replace `${NAME}` by the values of the environment, to open the address.

    Raises:
        DataError: a variable is not set, or the address was stored without its secret.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise DataError(
                f"{setting}: {address} needs {match[0]}, but it is not set in the environment; export {match[1]}=..."
            )
        return environment[match[1]]

    if REDACTED in find_secrets(address):
        raise DataError(
            f"{setting}: {address} was written without its secret; put the secret into an environment variable, and "
            f"${{NAME}} in the place of {REDACTED}"
        )
    return _VARIABLE.sub(value, address)


def restore_spelling(path: str, given: str) -> str:
    """Make a path that a file system returned begin with the address as the user gave it, without secrets.

    Some file systems keep user, password and query in their paths. Only the prefix is replaced.

    Args:
        path: the path of the address itself, or of a file below it.
        given: the address as the user gave it.
    """
    expanded, bare = expand_variables(given), path.lstrip("/")
    if "://" not in given or redact(given) == expanded:  # there are no secrets
        return path
    prefixes = (
        (expanded, redact(given)),
        (_WILDCARD.split(expanded)[0], redact(_WILDCARD.split(given)[0])),
    )
    for prefix, spelling in prefixes:
        if path.startswith(prefix):
            return spelling + path.removeprefix(prefix)
        address = prefix.rpartition("://")[2].lstrip("/")
        if address and bare.startswith(address):
            return spelling.rpartition("://")[2] + bare.removeprefix(address)
    if expanded.endswith(bare):  # a path without user and password, perhaps with a query
        return redact(f"file://host/{bare}").removeprefix("file://host/")
    return path


def make_redactor(addresses: Iterable[str], environment: Mapping[str, str] = os.environ) -> Callable[[str], str]:
    """Return a function that redacts the secrets of these addresses in a text, also without their addresses."""
    replacements: dict[str, str] = {}
    for address in addresses:
        variables = {environment[name]: f"${{{name}}}" for name in _VARIABLE.findall(address) if name in environment}
        expanded = _VARIABLE.sub(lambda match: environment.get(match[1], match[0]), address)
        for secret, replacement in (dict.fromkeys(find_secrets(expanded), REDACTED) | variables).items():
            replacements |= dict.fromkeys((secret, unquote(secret)), replacement)
    longest_first = sorted((secret for secret in replacements if len(secret) >= _MIN_SECRET), key=len, reverse=True)

    def redact_secrets(text: str) -> str:
        for secret in longest_first:
            text = text.replace(secret, replacements[secret])
        return redact(text)

    return redact_secrets


@contextmanager
def redacting_errors(addresses: Iterable[str], setting: str = SOURCES_SETTING) -> Iterator[None]:
    """Redact the secrets of these addresses in DataErrors from the block, and make them name `setting`."""
    try:
        yield
    except DataError as error:
        message = make_redactor(addresses)(str(error))
        if message.startswith(f"{SOURCES_SETTING}: "):
            message = setting + message.removeprefix(SOURCES_SETTING)
        if message == str(error):
            raise
        raise type(error)(message) from None
