"""What a secured Kafka broker and its clients need: a certificate, passwords, and their settings.

Settings have Kafka's own names, those of its Java clients, so that one dictionary is enough for the
planner, for Spark's source, and, through `python_settings`, for kafka-python. Programs read them
from a file (`read_config`), because a command line can be seen by everybody.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import ssl
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from helpers.jars import JarsError, java_command
from helpers.redaction import is_secret

PROTOCOL = "SASL_SSL"
MECHANISM = "SCRAM-SHA-512"
LOOPBACK = "127.0.0.1"
KEYTOOL_SECONDS = 30
CERTIFICATE_DAYS = 365

_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
_ALIAS = "broker"

_LOGGER = logging.getLogger(__name__)

_BLANKS = " \t\f"  # in a properties file

# What kafka-python's clients can be told in words, with the defaults that show of which kind it is.
_ARGUMENTS = {
    name: default
    for client in (KafkaProducer, KafkaConsumer, KafkaAdminClient)
    for name, default in client.DEFAULT_CONFIG.items()
    if default is None or isinstance(default, str | int | float)
    if not name.endswith(("serializer", "provider", "_context"))
}
_TLS_SETTINGS = {
    "ssl.truststore.type", "ssl.truststore.location", "ssl.truststore.certificates",
    "ssl.truststore.password", "ssl.keystore.type", "ssl.keystore.location", "ssl.keystore.key",
    "ssl.keystore.certificate.chain", "ssl.keystore.password", "ssl.key.password",
    "ssl.endpoint.identification.algorithm",
}  # fmt: skip


def new_password() -> str:
    """Return a password that nobody guesses.

    Examples
    --------
    >>> len(new_password())
    32
    """
    return secrets.token_urlsafe(24)


def make_certificate(folder: Path, password: str) -> None:
    """Make a key and a certificate for this machine's loopback interface, unless they are there.

    Parameters
    ----------
    folder : pathlib.Path
        Gets ``broker.p12`` (both, readable for this user only) and ``certificate.pem`` (what
        clients trust).
    password : str
        Of ``broker.p12``.

    Raises
    ------
    helpers.jars.JarsError
        If Java, or the `keytool` that comes with it, is missing.
    """
    store, certificate = folder / "broker.p12", folder / "certificate.pem"
    if certificate.exists():
        return
    opened = ["-keystore", str(store), "-storetype", "PKCS12", "-storepass:env", "STORE_PASSWORD"]
    _keytool(
        "-genkeypair", "-alias", _ALIAS, "-keyalg", "EC", "-groupname", "secp256r1",
        "-dname", "CN=localhost", "-ext", f"SAN=ip:{LOOPBACK},dns:localhost",
        "-validity", str(CERTIFICATE_DAYS), *opened, password=password,
    )  # fmt: skip
    store.chmod(0o600)
    _keytool(
        "-exportcert", "-rfc", "-alias", _ALIAS, "-file", str(certificate), *opened,
        password=password,
    )  # fmt: skip


def broker_settings(
    folder: Path, store_password: str, administrator: str, admin_password: str, password: str
) -> dict[str, Any]:
    """Return what a broker's settings file needs for security, listeners aside.

    Clients sign in with SCRAM-SHA-512; who may do what is for ACLs, and without one nothing is
    allowed. The broker signs in to its own controller with a password that only it knows: a
    controller that takes everybody would be a way around the ACLs.

    Parameters
    ----------
    folder : pathlib.Path
        Where `make_certificate` has put the key.
    store_password : str
        The key's password.
    administrator : str
        The user who may do everything.
    admin_password : str
        That user's password.
    password : str
        The broker's own.
    """
    controller = f'username="{_ALIAS}" password="{password}" user_{_ALIAS}="{password}"'
    return {
        "listener.security.protocol.map": f"{PROTOCOL}:{PROTOCOL},CONTROLLER:{PROTOCOL}",
        "inter.broker.listener.name": PROTOCOL,
        "sasl.enabled.mechanisms": MECHANISM,
        "sasl.mechanism.inter.broker.protocol": MECHANISM,
        "sasl.mechanism.controller.protocol": "PLAIN",
        f"listener.name.{PROTOCOL.lower()}.scram-sha-512.sasl.jaas.config": _jaas(
            administrator, admin_password
        ),
        "listener.name.controller.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.controller.plain.sasl.jaas.config": f"{_PLAIN} required {controller};",
        "ssl.keystore.type": "PKCS12",
        "ssl.keystore.location": folder / "broker.p12",
        "ssl.keystore.password": store_password,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": folder / "certificate.pem",
        "super.users": f"User:{administrator};User:{_ALIAS}",
        "allow.everyone.if.no.acl.found": "false",
    }


def client_settings(
    bootstrap_servers: str, certificate: Path, user: str, password: str
) -> dict[str, str]:
    """Return a client's settings, by Kafka's own names.

    Parameters
    ----------
    bootstrap_servers : str
        The brokers' addresses.
    certificate : pathlib.Path
        The file with the certificate that the client trusts.
    user, password : str
        Whom the client signs in as.

    Examples
    --------
    >>> settings = client_settings("127.0.0.1:9092", Path("certificate.pem"), "reader", "swordfish")
    >>> settings["sasl.mechanism"]
    'SCRAM-SHA-512'
    """
    return {
        "bootstrap.servers": bootstrap_servers,
        "security.protocol": PROTOCOL,
        "sasl.mechanism": MECHANISM,
        "sasl.jaas.config": _jaas(user, password),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(certificate),
    }


def read_config(path: str | Path) -> dict[str, str]:
    r"""Return the settings in a file of Kafka's properties format, as its own tools read it.

    Parameters
    ----------
    path : str or pathlib.Path
        The file, which `java.util.Properties` would read in the same way: comments, continued
        lines, ``\uXXXX``, in Latin-1.

    Raises
    ------
    OSError
        If the file can't be read.
    ValueError
        If it has a ``\u`` without four hexadecimal digits.

    Warns
    -----
    A warning in the log says so if others can read the secrets in it.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "client.properties"
    >>> _ = file.write_text("# the broker's\nsecurity.protocol = SASL_SSL\n")
    >>> read_config(file)
    {'security.protocol': 'SASL_SSL'}
    """
    file = Path(path)
    try:
        settings = dict(_properties(file.read_text("latin-1", errors="strict")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if any(map(is_secret, settings)) and file.stat().st_mode & 0o044:
        _LOGGER.warning("%s holds secrets, and other users can read it: chmod 600 %s", file, file)
    return settings


def config_option(text: str) -> dict[str, str]:
    """Return the settings in the file that a program's ``--kafka-config`` names.

    Raises
    ------
    argparse.ArgumentTypeError
        If it can't be read.
    """
    try:
        return read_config(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def setting_option(text: str) -> tuple[str, str]:
    """Return name and value of a program's ``--kafka-option``.

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
            "write it into a file, and name that with --kafka-config."
        )
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not of the form K=V")
    return name, value


def python_settings(
    settings: Mapping[str, str], client: type = KafkaAdminClient
) -> dict[str, Any]:
    """Return settings by Kafka's own names as arguments of one of kafka-python's clients.

    Parameters
    ----------
    settings : mapping
        Settings of Kafka's Java clients. A name's dots become underscores; certificates and keys
        are PEM, in files or in the settings themselves.
    client : type
        `KafkaProducer`, `KafkaConsumer`, or `KafkaAdminClient`. Settings that only the others know
        are left out.

    Raises
    ------
    ValueError
        If kafka-python doesn't know a setting, or can't take its value.

    Examples
    --------
    >>> python_settings({"bootstrap.servers": "127.0.0.1:9092,127.0.0.1:9093"})
    {'bootstrap_servers': ['127.0.0.1:9092', '127.0.0.1:9093']}
    >>> python_settings({"linger.ms": "50", "group.id": "scoring"}, KafkaProducer)
    {'linger_ms': 50}
    """
    arguments: dict[str, Any] = {}
    tls = {name: value for name, value in settings.items() if name.startswith("ssl.")}
    for name, value in settings.items():
        if name == "sasl.jaas.config":
            arguments |= _signing_in(value)
        elif name not in tls:
            argument = name.replace(".", "_")
            if argument not in _ARGUMENTS:
                raise ValueError(f"kafka-python has no setting {name!r}: leave it out.")
            if argument in client.DEFAULT_CONFIG:
                arguments[argument] = _as_argument(name, value, _ARGUMENTS[argument])
    if tls:
        arguments["ssl_context"] = _tls_context(tls)
    return arguments


def _properties(text: str) -> Iterator[tuple[str, str]]:
    """Yield the names and values in the text of a properties file."""
    lines = iter(re.split(r"\r\n|\r|\n", text))
    for line in lines:
        logical = line.lstrip(_BLANKS)
        if logical in ("", "\\") or logical[0] in "#!":
            continue
        while re.search(r"(?<!\\)(?:\\\\)*\\$", logical):
            logical = logical[:-1] + next(lines, "").lstrip(_BLANKS)
        name, value = re.fullmatch(
            rf"((?:[^\\=:{_BLANKS}]|\\.)*)[{_BLANKS}]*[=:]?[{_BLANKS}]*(.*)", logical, re.DOTALL
        ).groups()
        yield _unescaped(name), _unescaped(value)


def _unescaped(text: str) -> str:
    """Return a name or value of a properties file without the backslashes in it."""

    def character(found: re.Match) -> str:
        escaped = found[1]
        if escaped == "u":
            raise ValueError(f"\\u is not followed by four hexadecimal digits: {found[0]!r}.")
        if len(escaped) > 1:
            return chr(int(escaped[1:], 16))
        return {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}.get(escaped, escaped)

    plain = re.sub(r"\\(u[0-9a-fA-F]{4}|.)", character, text, flags=re.DOTALL)
    # Java's strings are UTF-16, where characters such as emoji are written as two.
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _as_argument(name: str, value: str, default: object) -> object:
    """Return the text of a setting as the Python object that kafka-python takes."""
    if name == "bootstrap.servers":
        return [address.strip() for address in value.split(",")]
    if (name, value) == ("compression.type", "none"):
        return None
    if value == "all" or (default is None and not name.endswith(".bytes")):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.strip().lower()]
        return value if isinstance(default, str) else int(value)
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(default, bool) else "a whole number"
        raise ValueError(f"Kafka's setting {name!r} is {value!r}: it must be {kind}.") from None


def _signing_in(jaas: str) -> dict[str, str]:
    """Return user and password of a JAAS entry; nothing if it has none, as that of Kerberos."""
    fields = dict(re.findall(r'\b(username|password)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s;"]+)', jaas))
    return {
        f"sasl_plain_{name}": re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value
        for name, value in fields.items()
    }


def _tls_context(settings: Mapping[str, str]) -> ssl.SSLContext:
    """Return what Kafka's settings ``ssl.*`` mean for Python."""
    for name in settings:
        if name not in _TLS_SETTINGS:
            raise ValueError(f"kafka-python has no setting {name!r}: leave it out.")
    for store in ("ssl.truststore", "ssl.keystore"):
        if settings.get(f"{store}.type", "PEM").upper() != "PEM":
            raise ValueError(
                f"{store}.type is {settings[f'{store}.type']}, which kafka-python can't read: "
                "convert it to PEM, which Kafka's Java clients read as well."
            )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = settings.get("ssl.endpoint.identification.algorithm", "https") != ""
    try:
        _load_certificates(context, settings)
    except ssl.SSLError as error:
        raise ValueError(f"the certificates or keys in ssl.* can't be read: {error}.") from None
    return context


def _load_certificates(context: ssl.SSLContext, settings: Mapping[str, str]) -> None:
    """Load whom a client trusts, and its own certificate."""
    trusted = settings.get("ssl.truststore.certificates")
    if trusted or settings.get("ssl.truststore.location"):
        context.load_verify_locations(
            settings.get("ssl.truststore.location"), cadata=_pem(trusted) if trusted else None
        )
    else:
        context.load_default_certs()
    password = settings.get("ssl.key.password")
    if settings.get("ssl.keystore.location"):
        context.load_cert_chain(settings["ssl.keystore.location"], password=password)
    elif settings.get("ssl.keystore.key"):
        with tempfile.NamedTemporaryFile("w") as file:  # Python reads keys from files only
            file.write(_pem(settings["ssl.keystore.key"]))
            file.write(_pem(settings.get("ssl.keystore.certificate.chain", "")))
            file.flush()
            context.load_cert_chain(file.name, password=password)


def _pem(text: str) -> str:
    """Return PEM with the line breaks that Python needs, and Kafka's settings mostly don't have."""
    found = re.findall(r"-----BEGIN ([A-Z ]+)-----(.*?)-----END \1-----", text, re.DOTALL)
    return "".join(
        f"-----BEGIN {kind}-----\n{chr(10).join(textwrap.wrap(''.join(body.split()), 64))}\n"
        f"-----END {kind}-----\n"
        for kind, body in found
    )


def _jaas(user: str, password: str) -> str:
    return f'{_SCRAM} required username="{user}" password="{password}";'


def _keytool(*arguments: str, password: str) -> None:
    """Run Java's `keytool`, with the password in its environment: a command line can be seen."""
    program = Path(java_command()).resolve().parent / "keytool"
    if not program.exists():
        raise JarsError(f"{program} is missing: install a Java that has it, as OpenJDK does.")
    run = subprocess.run(
        [str(program), *arguments], env={**os.environ, "STORE_PASSWORD": password},
        capture_output=True, text=True, timeout=KEYTOOL_SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if run.returncode != 0:
        raise JarsError(f"keytool made no certificate: {(run.stdout + run.stderr).strip()}")
