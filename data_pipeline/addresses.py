"""Addresses of files, and the secrets in them: `s3://key:secret@host/x`, `https://host/x?token=...`, `${NAME}` of the environment.

What is written or shown has no secret in it: `***` stands in its place, and `${NAME}` stays as it is. A value of the environment is
filled in when files are opened, and goes no further.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import unquote

from data_pipeline.errors import REDACTED, DataError, find_secrets, redact

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FIXED = re.compile(r"[*?\[]")
"""Ends the part of an address that is the same for all files of a glob."""

SOURCES_SETTING = "data.sources"
"""The setting that errors on sources name, unless `redacting_errors` knows of another."""

_LEAST = 4
"""Characters of the shortest secret that is looked for in a text: shorter ones are found in any."""


def expand_variables(address: str, setting: str = SOURCES_SETTING, environment: Mapping[str, str] = os.environ) -> str:
    """The address with the values of `${NAME}`, as it is opened.

    Raises:
        DataError: the environment has no such variable, or the address comes from where secrets were left out.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise DataError(
                f"{setting}: {address} needs {match[0]}, which the environment does not have; export {match[1]}=..."
            )
        return environment[match[1]]

    if REDACTED in find_secrets(address):
        raise DataError(
            f"{setting}: {address} was written without its secret; put the secret into an environment variable, and ${{NAME}} in "
            f"the place of {REDACTED}"
        )
    return _VARIABLE.sub(value, address)


def restore_spelling(path: str, given: str) -> str:
    """A path that a file system has for an address, or for a file below it, with the address spelt as given and without its secrets.

    Some file systems keep user, password and query in their paths. Only the address changes, whatever a file below it is called.
    """
    filled, bare = expand_variables(given), path.lstrip("/")
    if "://" not in given or redact(given) == filled:  # nothing to conceal
        return path
    for whole, spelt in ((filled, redact(given)), (_FIXED.split(filled)[0], redact(_FIXED.split(given)[0]))):
        if path.startswith(whole):
            return spelt + path.removeprefix(whole)
        address = whole.rpartition("://")[2].lstrip("/")
        if address and bare.startswith(address):
            return spelt.rpartition("://")[2] + bare.removeprefix(address)
    if filled.endswith(bare):  # without user and password, perhaps with a query
        return redact(f"file://host/{bare}").removeprefix("file://host/")
    return path


def make_redactor(addresses: Iterable[str], environment: Mapping[str, str] = os.environ) -> Callable[[str], str]:
    """A function that redacts the secrets of these addresses in a text, even where only the password appears without its address."""
    found: dict[str, str] = {}
    for address in addresses:
        named = {environment[name]: f"${{{name}}}" for name in _VARIABLE.findall(address) if name in environment}
        literal = _VARIABLE.sub(lambda match: environment.get(match[1], match[0]), address)
        found |= dict.fromkeys(find_secrets(literal), REDACTED) | named
    forms = {
        form: instead for secret, instead in found.items() for form in (secret, unquote(secret)) if len(form) >= _LEAST
    }
    longest_first = sorted(forms, key=len, reverse=True)

    def conceal(text: str) -> str:
        for form in longest_first:
            text = text.replace(form, forms[form])
        return redact(text)

    return conceal


@contextmanager
def redacting_errors(addresses: Iterable[str], setting: str = SOURCES_SETTING) -> Iterator[None]:
    """Errors that leave the block tell no secret of these addresses, and name the setting that they stand in."""
    try:
        yield
    except DataError as error:
        concealed = make_redactor(addresses)(str(error))
        if concealed.startswith(f"{SOURCES_SETTING}: "):
            concealed = setting + concealed.removeprefix(SOURCES_SETTING)
        if concealed == str(error):
            raise
        raise type(error)(concealed) from None
