"""Settings for Kafka clients, by Kafka's names: reading them, and which of them are secret.

Secret settings come from a file, because every user of a machine can see its command lines.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# How long Kafka may take to answer a request.
ANSWER_SECONDS = 15

_LOGGER = logging.getLogger(__name__)

# Settings whose values must stay secret: everything that Kafka calls a password, and more.
SECRET_SETTINGS = r"passw|passphrase|jaas|secret|token|user\.info|private\.key|keystore\.key"
_SECRET = re.compile(SECRET_SETTINGS, re.IGNORECASE)

# The names of settings in a file. Anything else is the rest of a value, perhaps a secret one.
_NAME = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)+|acks|retries")

# A value in an entry of JAAS: quoted in one way or the other, or not at all.
JAAS_VALUE = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s;"']+)"""

# As some editors on Windows write them, in UTF-8 or UTF-16; a properties file is in Latin-1.
_BYTE_ORDER_MARKS = ("\xef\xbb\xbf", "\xff\xfe", "\xfe\xff")

_BLANKS = " \t\f"  # white space in a properties file


def is_secret(name: str) -> bool:
    """Return whether the value of a Kafka setting is secret.

    Examples
    --------
    >>> is_secret("sasl.jaas.config"), is_secret("ssl.truststore.location")
    (True, False)
    """
    return _SECRET.search(name) is not None


def check_address(bootstrap_servers: str) -> None:
    """Raise `ValueError` unless the text is a comma-separated list of ``host:port``.

    Examples
    --------
    >>> check_address("127.0.0.1:9092,127.0.0.1:9093")
    >>> check_address("127.0.0.1")
    Traceback (most recent call last):
    ...
    ValueError: '127.0.0.1' is not the address of a Kafka broker: write host:port.
    """
    for address in bootstrap_servers.split(","):
        host, _, port = address.strip().rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"{address!r} is not the address of a Kafka broker: write host:port.")


class ClientSettings(dict[str, Any]):
    """Settings of a Kafka client, which are shown without secrets, in a notebook for example.

    Examples
    --------
    >>> ClientSettings({"sasl.mechanism": "PLAIN", "ssl.key.password": "swordfish"})
    {'sasl.mechanism': 'PLAIN', 'ssl.key.password': '***'}
    >>> ClientSettings({"ssl.key.password": "swordfish"}) | {"group.id": "scoring"}
    {'ssl.key.password': '***', 'group.id': 'scoring'}
    """

    def __or__(self, others: Mapping[str, Any]) -> ClientSettings:
        return ClientSettings({**self, **others})

    def __ror__(self, others: Mapping[str, Any]) -> ClientSettings:
        return ClientSettings({**others, **self})

    def copy(self) -> ClientSettings:
        """Return a copy, which also hides secrets."""
        return ClientSettings(self)

    def __repr__(self) -> str:
        return repr({name: shown(name, value) for name, value in self.items()})


def shown(name: str, value: Any) -> Any:
    """Return a setting's value, or stars if it is, or looks like, a secret.

    Examples
    --------
    >>> shown("ssl.keystore.location", "-----BEGIN PRIVATE KEY-----")
    '***'
    """
    is_hidden = is_secret(name) or re.search("password|PRIVATE KEY", str(value), re.IGNORECASE)
    return "***" if is_hidden else value


def check_protocol(settings: Mapping[str, str]) -> None:
    """Raise `ValueError` if settings for TLS or a login would have no effect.

    Examples
    --------
    >>> check_protocol({"security.protocol": "SSL", "ssl.truststore.type": "PEM"})
    >>> check_protocol({"ssl.truststore.type": "PEM"})
    Traceback (most recent call last):
    ...
    ValueError: 'ssl.truststore.type' is set, but not 'security.protocol', without which Kafka's ...
    """
    secured = [name for name in settings if name.startswith(("ssl.", "sasl."))]
    if secured and "security.protocol" not in settings:
        raise ValueError(
            f"{secured[0]!r} is set, but not 'security.protocol', without which Kafka's clients "
            "connect in plain text: set it to SSL or SASL_SSL, as the broker expects."
        )


def connection_settings(bootstrap_servers: str, kafka_config: str = "") -> ClientSettings:
    """Return the settings with which all clients connect to Kafka, by Kafka's names.

    Parameters
    ----------
    bootstrap_servers : str
        Addresses of brokers, ``host:port`` separated by commas.
    kafka_config : str
        A file with further settings, such as those of security, in Kafka's properties format; empty
        for none.

    Raises
    ------
    ValueError
        If the address is missing or has no port, or the file can't be read.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "client.properties"
    >>> _ = file.write_text("security.protocol = SSL")
    >>> connection_settings("127.0.0.1:9092", str(file))
    {'security.protocol': 'SSL', 'bootstrap.servers': '127.0.0.1:9092'}
    """
    if kafka_config and not bootstrap_servers:
        raise ValueError(
            f"{kafka_config} says how to connect, but not where to: also give the brokers' "
            "addresses, as bootstrap_servers."
        )
    check_address(bootstrap_servers)
    given = read_config(kafka_config) if kafka_config else {}
    return ClientSettings({**given, "bootstrap.servers": bootstrap_servers})


def read_config(path: str | Path) -> ClientSettings:
    r"""Return the settings in a properties file, as Kafka's tools read it.

    Parameters
    ----------
    path : str or pathlib.Path
        The file. As for `java.util.Properties`, it may have comments, continued lines and
        ``\uXXXX``, and its encoding is Latin-1.

    Raises
    ------
    ValueError
        If the file can't be read, or a line doesn't begin with the name of a setting, such as the
        second line of a key, or has a ``\u`` that four hexadecimal digits don't follow.

    Warns
    -----
    A warning is logged if other users can read the secrets in the file.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "client.properties"
    >>> _ = file.write_text("# the broker's\nsecurity.protocol = SASL_SSL\n")
    >>> read_config(file)
    {'security.protocol': 'SASL_SSL'}
    """
    file = Path(path)
    try:
        text = file.read_text("latin-1", errors="strict")
        if text.startswith(_BYTE_ORDER_MARKS):
            raise ValueError("it begins with a byte-order mark: save it without one, as Latin-1.")
        lines = list(properties(text))
    except OSError as error:
        raise ValueError(
            f"{file} can't be read ({error.strerror}): give the absolute path of a file with "
            "settings for Kafka clients."
        ) from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for number, name, _ in lines:
        if not _NAME.fullmatch(name):  # it isn't shown, because it may be a secret
            raise ValueError(
                f"{file}: line {number} doesn't begin with the name of a setting. If it continues "
                "the line before, end that one with a backslash."
            )
    settings = ClientSettings({name: value for _, name, value in lines})
    if any(map(is_secret, settings)) and file.stat().st_mode & 0o044:
        _LOGGER.warning("%s has secrets, and other users can read it: chmod 600 %s", file, file)
    return settings


def config_option(text: str) -> dict[str, str]:
    """Return the settings in the file given as a program's ``--kafka-config``; none for ''.

    Raises
    ------
    argparse.ArgumentTypeError
        If the file can't be read.

    Examples
    --------
    >>> config_option("")
    {}
    """
    try:
        return read_config(text) if text else {}
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def setting_option(text: str) -> tuple[str, str]:
    """Return the name and value given as a program's ``--kafka-option``.

    Raises
    ------
    argparse.ArgumentTypeError
        If there is no ``=``, or the value is a secret.

    Examples
    --------
    >>> setting_option("security.protocol=SASL_SSL")
    ('security.protocol', 'SASL_SSL')
    """
    name, equals, value = text.partition("=")
    if is_secret(name) or "PRIVATE KEY" in value:
        raise argparse.ArgumentTypeError(
            f"{name} holds a secret, and every user of this machine can see a command line (ps): "
            "write it into a file, and name the file with --kafka-config."
        )
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not of the form K=V")
    return name, value


def properties(text: str) -> Iterator[tuple[int, str, str]]:
    r"""Yield the names and values in a properties file's text, with the numbers of their lines.

    Raises
    ------
    ValueError
        If a ``\u`` isn't followed by four hexadecimal digits.

    Examples
    --------
    >>> list(properties("# Spark's\nspark.jars  a.jar,b.jar\n"))
    [(2, 'spark.jars', 'a.jar,b.jar')]
    """
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    for number, line in lines:
        logical = line.lstrip(_BLANKS)
        if logical in ("", "\\") or logical[0] in "#!":
            continue
        while re.search(r"(?<!\\)(?:\\\\)*\\$", logical):
            _, following = next(lines, (0, ""))
            logical = logical[:-1] + following.lstrip(_BLANKS)
        name, value = re.fullmatch(
            rf"((?:[^\\=:{_BLANKS}]|\\.)*)[{_BLANKS}]*[=:]?[{_BLANKS}]*(.*)", logical, re.DOTALL
        ).groups()
        yield number, _unescaped(name), _unescaped(value)


def _unescaped(text: str) -> str:
    """Return a name or value from a properties file with its backslash escapes resolved."""

    def character(found: re.Match) -> str:
        escaped = found[1]
        if escaped == "u":
            raise ValueError(f"\\u is not followed by four hexadecimal digits: {found[0]!r}.")
        if len(escaped) > 1:
            return chr(int(escaped[1:], 16))
        return {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}.get(escaped, escaped)

    plain = re.sub(r"\\(u[0-9a-fA-F]{4}|.)", character, text, flags=re.DOTALL)
    # Java's strings are UTF-16: an emoji, for example, is written as two escapes.
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
