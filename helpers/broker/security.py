"""The certificate, passwords and settings of a secured Kafka broker and its clients.

Settings have the names of Kafka's Java clients, so that the planner, Spark's Kafka source and,
through `python_settings`, kafka-python all use the same dictionary.
"""

from __future__ import annotations

import os
import re
import secrets
import ssl
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from helpers.kafka_settings import JAAS_VALUE, ClientSettings, check_protocol, shown
from helpers.spark import JarsError, java_command

PROTOCOL = "SASL_SSL"
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISM = "SCRAM-SHA-512"
LOOPBACK = "127.0.0.1"
KEYTOOL_SECONDS = 120
CERTIFICATE_DAYS = 365
ADMINISTRATOR = "admin"
PASSWORD_BYTES = 24

_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
_ALIAS = "broker"

# Arguments of kafka-python's clients that can be given as text; the default shows the type.
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


class Passwords:
    """The passwords of a secured broker, its key store and its administrator."""

    def __init__(self) -> None:
        self.broker, self.store, self.administrator = (
            secrets.token_urlsafe(PASSWORD_BYTES) for _ in range(3)
        )


def make_certificate(folder: Path, password: str) -> None:
    """Create a key and a certificate for the loopback interface, unless they exist.

    Parameters
    ----------
    folder : pathlib.Path
        Where to write ``broker.p12`` (both, readable only by this user) and ``certificate.pem``
        (which clients trust).
    password : str
        The password of ``broker.p12``.

    Raises
    ------
    helpers.spark.JarsError
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


def broker_settings(folder: Path, passwords: Passwords) -> dict[str, Any]:
    """Return a broker's security settings, except its listeners.

    Clients authenticate with SCRAM-SHA-512, and only operations granted by an ACL are allowed. The
    broker authenticates to its controller with another password, because the ACLs could be bypassed
    through a controller that accepts everyone.

    Parameters
    ----------
    folder : pathlib.Path
        The folder with the files of `make_certificate`.
    passwords : Passwords
        Those of the broker for its controller, of its key, and of the superuser.
    """
    password = passwords.broker
    controller = f'username="{_ALIAS}" password="{password}" user_{_ALIAS}="{password}"'
    return {
        "listener.security.protocol.map": f"{PROTOCOL}:{PROTOCOL},CONTROLLER:{PROTOCOL}",
        "inter.broker.listener.name": PROTOCOL,
        "sasl.enabled.mechanisms": MECHANISM,
        "sasl.mechanism.inter.broker.protocol": MECHANISM,
        "sasl.mechanism.controller.protocol": "PLAIN",
        f"listener.name.{PROTOCOL.lower()}.scram-sha-512.sasl.jaas.config": jaas(
            ADMINISTRATOR, passwords.administrator
        ),
        "listener.name.controller.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.controller.plain.sasl.jaas.config": f"{_PLAIN} required {controller};",
        "ssl.keystore.type": "PKCS12",
        "ssl.keystore.location": folder / "broker.p12",
        "ssl.keystore.password": passwords.store,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": folder / "certificate.pem",
        "super.users": f"User:{ADMINISTRATOR};User:{_ALIAS}",
        "allow.everyone.if.no.acl.found": "false",
    }


def jaas(user: str, password: str) -> str:
    """Return the value of ``sasl.jaas.config`` for a user.

    Examples
    --------
    >>> jaas("reader", "swordfish").split(maxsplit=1)[1]
    'required username="reader" password="swordfish";'
    """
    return f'{_SCRAM} required username="{user}" password="{password}";'


def python_settings(
    settings: Mapping[str, str], client: type = KafkaAdminClient
) -> ClientSettings:
    """Convert settings with Kafka's names to arguments for a kafka-python client.

    Parameters
    ----------
    settings : mapping
        Settings for Kafka's Java clients. Dots in names become underscores. Keys are PEM, in a file
        or inline, and so are certificates, or they are in a trust store of Java.
    client : type
        `KafkaProducer`, `KafkaConsumer` or `KafkaAdminClient`. Settings known only to the others
        are dropped.

    Returns
    -------
    ClientSettings
        Arguments by kafka-python's names, which are shown without passwords.

    Raises
    ------
    ValueError
        If kafka-python doesn't know a setting, doesn't accept its value, or lacks a package for it.

    Examples
    --------
    >>> python_settings({"bootstrap.servers": "127.0.0.1:9092,127.0.0.1:9093"})
    {'bootstrap_servers': ['127.0.0.1:9092', '127.0.0.1:9093']}
    >>> python_settings({"linger.ms": "50", "group.id": "scoring"}, KafkaProducer)
    {'linger_ms': 50}
    """
    # As Kafka's Java clients do.
    settings = {name: value.strip() for name, value in settings.items()}
    if "security.protocol" in settings:
        settings["security.protocol"] = _protocol(settings["security.protocol"])
        if settings["security.protocol"].startswith("SASL_"):
            settings.setdefault("sasl.mechanism", "GSSAPI")
    if settings.get("sasl.mechanism") == "GSSAPI" and find_spec("gssapi") is None:
        raise ValueError(
            "sasl.mechanism is GSSAPI, Kafka's default, for which kafka-python needs a package: "
            "pip install gssapi (it is compiled, with gcc and the headers in libkrb5-dev). For a "
            "login with a password, set PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."
        )
    arguments = ClientSettings()
    tls = {name: value for name, value in settings.items() if name.startswith("ssl.")}
    for name, value in settings.items():
        if name == "sasl.jaas.config":
            arguments |= _credentials(value)
        elif name not in tls:
            argument = name.replace(".", "_")
            if argument not in _ARGUMENTS or "_" in name:  # unlike Kafka's, it would be unchecked
                raise ValueError(f"kafka-python has no setting {name!r}: leave it out.")
            if argument in client.DEFAULT_CONFIG:
                arguments[argument] = _as_argument(name, value, _ARGUMENTS[argument])
    if tls:
        arguments["ssl_context"] = _tls_context(tls)
    check_protocol(settings)
    return arguments


def _protocol(value: str) -> str:
    """Return the name of a protocol; kafka-python takes an unknown one for PLAINTEXT."""
    if value.upper() not in _PROTOCOLS:
        raise ValueError(
            f"Kafka's setting 'security.protocol' is {value!r}: it must be one of "
            f"{', '.join(_PROTOCOLS)}."
        )
    return value.upper()


def _as_argument(name: str, value: str, default: object) -> object:
    """Return the text of a setting as the Python object that kafka-python expects."""
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


def _credentials(jaas: str) -> dict[str, str]:
    """Return the user and password in a JAAS entry; one for Kerberos, for example, has none."""
    fields = dict(re.findall(rf"\b(username|password)\s*=\s*({JAAS_VALUE})", jaas))
    return {
        f"sasl_plain_{name}": re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] in "\"'" else value
        for name, value in fields.items()
    }


def _tls_context(settings: Mapping[str, str]) -> ssl.SSLContext:
    """Return Kafka's ``ssl.*`` settings as a Python SSL context."""
    for name in settings:
        if name not in _TLS_SETTINGS:
            raise ValueError(f"kafka-python has no setting {name!r}: leave it out.")
    for name in ("ssl.truststore.location", "ssl.keystore.location"):
        file = settings.get(name)
        if file is not None and not (os.path.isfile(file) and os.access(file, os.R_OK)):
            value = shown(name, settings[name])  # which may be the key itself
            raise ValueError(f"{name} is {value!r}: name a file that you can read.")
    keys = _store_type(settings, "ssl.keystore")
    if keys != "PEM" and "ssl.keystore.location" in settings:
        raise ValueError(
            f"ssl.keystore.type is {keys}, from which kafka-python can't read a key: convert it to "
            "PEM, which Kafka's Java clients read as well (docs/clusters.md has the commands)."
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
    """Load the certificates that a client trusts, and the client's certificate and key."""
    trusted, file = (
        settings.get(f"ssl.truststore.{name}") for name in ("certificates", "location")
    )
    if file and _store_type(settings, "ssl.truststore") != "PEM":
        trusted, file = _certificates(settings, file), None
    if trusted or file:
        context.load_verify_locations(file, cadata=_pem(trusted) if trusted else None)
    else:
        context.load_default_certs()
    password = settings.get("ssl.key.password", "")  # with None, OpenSSL would ask at the terminal
    if settings.get("ssl.keystore.location"):
        context.load_cert_chain(settings["ssl.keystore.location"], password=password)
    elif settings.get("ssl.keystore.key"):
        with tempfile.NamedTemporaryFile("w") as file:  # Python can load a key only from a file
            file.write(_pem(settings["ssl.keystore.key"]))
            file.write(_pem(settings.get("ssl.keystore.certificate.chain", "")))
            file.flush()
            context.load_cert_chain(file.name, password=password)


def _store_type(settings: Mapping[str, str], store: str) -> str:
    """Return the type of a key store or trust store; Kafka's default is JKS."""
    return settings.get(f"{store}.type", "JKS").upper()


def _certificates(settings: Mapping[str, str], file: str) -> str:
    """Return the certificates in a trust store of Java as PEM."""
    arguments = ["-list", "-rfc", "-keystore", file]
    if "ssl.truststore.password" in settings:
        arguments += ["-storepass:env", "STORE_PASSWORD"]
    try:
        return _keytool(*arguments, password=settings.get("ssl.truststore.password", ""))
    except (JarsError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"ssl.truststore.location can't be read: {error}") from None


def _pem(text: str) -> str:
    """Return PEM with the line breaks that Python needs and Kafka's settings often lack."""
    found = re.findall(r"-----BEGIN ([A-Z ]+)-----(.*?)-----END \1-----", text, re.DOTALL)
    return "".join(
        f"-----BEGIN {kind}-----\n{chr(10).join(textwrap.wrap(''.join(body.split()), 64))}\n"
        f"-----END {kind}-----\n"
        for kind, body in found
    )


def _keytool(*arguments: str, password: str) -> str:
    """Return what Java's `keytool` prints.

    The password is in its environment, because command lines are visible.
    """
    program = Path(java_command()).resolve().parent / "keytool"
    if not program.exists():
        raise JarsError(f"{program} is missing: install a Java that includes it, such as OpenJDK.")
    run = subprocess.run(
        [str(program), *arguments], env={**os.environ, "STORE_PASSWORD": password},
        capture_output=True, text=True, timeout=KEYTOOL_SECONDS, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if run.returncode != 0:
        raise JarsError(f"keytool failed: {(run.stdout + run.stderr).strip()}")
    return run.stdout
