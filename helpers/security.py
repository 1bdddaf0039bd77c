"""What a secured Kafka broker and its clients need: a certificate, passwords, and their settings.

Settings have Kafka's own names, those of its Java clients, so that one dictionary is enough for the
planner, for Spark's source, and, through `python_settings`, for kafka-python.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.jars import JarsError, java_command

PROTOCOL = "SASL_SSL"
MECHANISM = "SCRAM-SHA-512"
LOOPBACK = "127.0.0.1"
KEYTOOL_SECONDS = 30
CERTIFICATE_DAYS = 365

_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"
_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule"
_ALIAS = "broker"


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


def python_settings(settings: Mapping[str, str]) -> dict[str, Any]:
    """Return settings by Kafka's own names as arguments of kafka-python's clients.

    Parameters
    ----------
    settings : mapping
        ``bootstrap.servers``, and for a secured broker ``security.protocol``, ``sasl.mechanism``,
        ``sasl.jaas.config`` and ``ssl.truststore.location`` (a PEM file); no others.

    Raises
    ------
    ValueError
        If there is a setting that isn't one of these.

    Examples
    --------
    >>> python_settings({"bootstrap.servers": "127.0.0.1:9092,127.0.0.1:9093"})
    {'bootstrap_servers': ['127.0.0.1:9092', '127.0.0.1:9093']}
    """
    arguments: dict[str, Any] = {}
    for name, value in settings.items():
        match name:
            case "bootstrap.servers":
                arguments["bootstrap_servers"] = value.split(",")
            case "security.protocol" | "sasl.mechanism":
                arguments[name.replace(".", "_")] = value
            case "ssl.truststore.location":
                arguments["ssl_cafile"] = value
            case "sasl.jaas.config":
                for field in ("username", "password"):
                    found = re.search(rf'\b{field}="([^"]*)"', value)
                    arguments[f"sasl_plain_{field}"] = found[1] if found else ""
            case "ssl.truststore.type" if value == "PEM":
                pass  # the only one that kafka-python reads
            case _:
                raise ValueError(f"kafka-python is not told of {name!r} here: leave it out.")
    return arguments


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
