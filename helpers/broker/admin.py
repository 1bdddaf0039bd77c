"""Administration of a broker: topics, record counts, users and their ACLs."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from kafka.errors import (
    KafkaConfigurationError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    SaslAuthenticationFailedError,
    TopicAlreadyExistsError,
    UnsupportedSaslMechanismError,
)

from helpers.broker.security import PASSWORD_BYTES, jaas, python_settings
from helpers.broker.server import START_SECONDS, BrokerError
from helpers.kafka_settings import ANSWER_SECONDS, ClientSettings, check_address

_REFUSALS = (SaslAuthenticationFailedError, UnsupportedSaslMechanismError)

# Messages for the errors of TLS, by a pattern of their text; the first match counts.
_TLS_REFUSALS = {
    "certificate (has expired|is not yet valid)": "the certificate of Kafka at {servers} is valid "
    "at another time ({error}): renew it, or correct this machine's clock.",
    "(Hostname|IP address) mismatch": "the certificate of Kafka at {servers} is for another name "
    "({error}): use an address that the certificate contains.",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of Kafka at {servers} isn't trusted: set "
    "ssl.truststore.location to a file with its certificate, or its authority's.",
    "ALERT_.*CERTIFICATE": "Kafka at {servers} wants a client's certificate that it trusts: set "
    "ssl.keystore.location to a file with your key and certificate.",
}

_STOP_SECONDS = 10  # how long a client's thread may take to end

CONNECT_TIME_OUT = {"bootstrap_timeout_ms": ANSWER_SECONDS * 1000}


class BrokerAdmin:
    """Administers a broker through Kafka clients; a subclass defines how they connect."""

    settings: ClientSettings  # of the administrator's clients, by Kafka's names

    def create_topic(
        self, name: str, partitions: int = 4, config: Mapping[str, object] | None = None
    ) -> None:
        """Create a topic and wait until it is writable; an existing topic is left unchanged.

        Parameters
        ----------
        name : str
            The topic's name.
        partitions : int
            Number of partitions: as many tasks can read the topic in parallel.
        config : mapping, optional
            Topic settings by Kafka's names, such as ``{"retention.ms": 3_600_000}``.

        Raises
        ------
        kafka.errors.KafkaError
            If the broker refuses the name or a setting.

        Examples
        --------
        >>> from helpers.broker import LocalKafka
        >>> with LocalKafka() as kafka:
        ...     kafka.create_topic("events", partitions=1, config={"compression.type": "zstd"})
        """
        settings = {key: str(value) for key, value in (config or {}).items()}
        topic = {
            "num_partitions": partitions, "replication_factor": 1, "assignments": {},
            "configs": settings,
        }  # fmt: skip
        with admin_client(self.settings) as admin:
            with contextlib.suppress(TopicAlreadyExistsError):
                admin.create_topics({name: topic})
            if not wait_until(lambda: _has_leaders(admin, name), START_SECONDS):
                raise BrokerError(f"topic {name} has no leader after {START_SECONDS} s.")

    def add_user(self, name: str) -> ClientSettings:
        """Add a user with a new password to a secured broker, and return client settings.

        Parameters
        ----------
        name : str
            The user's name. A new user has no permissions; see `allow`.

        Returns
        -------
        ClientSettings
            Settings by Kafka's names, which are shown without the password.
            `helpers.broker.python_settings` converts them to arguments of kafka-python.

        Raises
        ------
        BrokerError
            If the broker refuses.

        Examples
        --------
        >>> from helpers.broker import LocalKafka
        >>> with LocalKafka(security="SASL_SSL") as kafka:
        ...     reader = kafka.add_user("reader")
        ...     kafka.allow("reader", ["READ", "DESCRIBE"], topic="events")
        ...     kafka.allow("reader", ["READ"], group="scoring")
        >>> reader["security.protocol"], reader["sasl.mechanism"]
        ('SASL_SSL', 'SCRAM-SHA-512')
        """
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        user = UserScramCredentialUpsertion(name, ScramMechanism.SCRAM_SHA_512, password)
        with admin_client(self.settings) as admin:
            refusals = admin.alter_user_scram_credentials([user])
        if refusals.get(name):
            raise BrokerError(f"user {name!r} can't be added: {refusals[name]}.")
        return self.settings | {"sasl.jaas.config": jaas(name, password)}

    def allow(
        self, user: str, operations: Iterable[str], topic: str = "", group: str = ""
    ) -> None:
        """Allow a user of a secured broker to perform operations on a topic or consumer group.

        Parameters
        ----------
        user : str
            The user.
        operations : iterable of str
            Operations by Kafka's names, such as ``READ``, ``WRITE``, ``DESCRIBE``, ``CREATE``.
        topic, group : str
            The name of a topic or a group, not both; ``*`` means all.
        """
        kind = ResourceType.TOPIC if topic else ResourceType.GROUP
        rules = [
            ACL(
                principal=f"User:{user}", host="*", operation=ACLOperation[operation],
                permission_type=ACLPermissionType.ALLOW,
                resource_pattern=ResourcePattern(kind, topic or group),
            )
            for operation in operations
        ]  # fmt: skip
        with admin_client(self.settings) as admin:
            admin.create_acls(rules)

    def topics(self) -> list[str]:
        """Return the names of all topics, sorted, without Kafka's internal ones.

        Examples
        --------
        >>> from helpers.broker import LocalKafka
        >>> with LocalKafka() as kafka:
        ...     kafka.topics()
        []
        """
        with admin_client(self.settings) as admin:
            return sorted(name for name in admin.list_topics() if not name.startswith("__"))


def count_records(kafka: str | Mapping[str, str], topic: str) -> dict[int, int]:
    """Return the number of records in each partition; empty if the topic doesn't exist.

    Parameters
    ----------
    kafka : str or mapping
        Addresses of brokers, ``host:port`` separated by commas, or a client's settings by Kafka's
        names.
    topic : str
        The topic's name.

    Returns
    -------
    dict of int to int
        Number of offsets in each partition, by partition number.

    Raises
    ------
    BrokerError
        If no broker answers within 15 s, or Kafka refuses access.
    ValueError
        If the address has no port, or kafka-python can't use a setting.

    Examples
    --------
    >>> from helpers.broker import LocalKafka
    >>> with LocalKafka() as kafka:
    ...     kafka.create_topic("events", partitions=2)
    ...     count_records(kafka.bootstrap_servers, "events")
    {0: 0, 1: 0}
    """
    settings = {"bootstrap.servers": kafka} if isinstance(kafka, str) else kafka
    servers = settings["bootstrap.servers"]
    check_address(servers)
    given = {**python_settings(settings, KafkaConsumer), **CONNECT_TIME_OUT}
    with connecting(servers), contextlib.closing(KafkaConsumer(**given)) as consumer:
        numbers = consumer.partitions_for_topic(topic) or ()
        partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
        firsts, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    return {part.partition: ends[part] - firsts[part] for part in partitions}


def abandon(producer: KafkaProducer) -> None:
    """Close a producer at once; records that it couldn't send have failed."""
    # A private API; without it, `close` would wait for a broker that is away.
    producer._sender.force_close()
    producer._sender.join(_STOP_SECONDS)
    with contextlib.suppress(KafkaError):
        producer.close(timeout=1)


@contextlib.contextmanager
def connecting(servers: str) -> Iterator[None]:
    """Explain why a kafka-python client can't connect to Kafka.

    The clients only log the reason, try again, and raise a time-out in the end.

    Parameters
    ----------
    servers : str
        The brokers' addresses, for the message.

    Raises
    ------
    BrokerError
        Instead of the client's error, with a remedy.

    Examples
    --------
    >>> with connecting("127.0.0.1:1"):
    ...     KafkaConsumer(bootstrap_servers="127.0.0.1:1", bootstrap_timeout_ms=100)
    Traceback (most recent call last):
    ...
    helpers.broker.server.BrokerError: no Kafka broker answers at 127.0.0.1:1 within 15 s: ...
    """
    log, kept = logging.getLogger("kafka"), _Reason(logging.WARNING)
    log.addHandler(kept)
    try:
        yield
    except (KafkaTimeoutError, KafkaConnectionError) as error:
        raise BrokerError(_refusal(kept.error or error, servers)) from error
    except KafkaError as error:
        raise BrokerError(_refusal(error, servers)) from error
    finally:
        log.removeHandler(kept)


class _Reason(logging.Handler):
    """Keeps the exception that says why a client can't connect, among those that it logs."""

    error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]  # clients log in an `except` block
        if isinstance(error, _REFUSALS) or "[SSL" in str(error) or _is_of_kerberos(error):
            self.error = error
        elif isinstance(error, KafkaConnectionError) and _was_closed(self.error or error):
            self.error = error  # unless a later attempt is told more


def _was_closed(error: BaseException) -> bool:
    """Return whether the broker has closed a connection, for a reason that kafka-python loses.

    It drops a broker's answer if the end of the connection comes with it.
    """
    return isinstance(error, KafkaConnectionError) and "socket disconnected" in str(error)


def _is_of_kerberos(error: BaseException | None) -> bool:
    """Return whether an exception is from the package gssapi, or from a broker with Kerberos."""
    is_refusal = isinstance(error, _REFUSALS) and "GSSAPI" in str(error)
    return is_refusal or type(error).__module__.startswith("gssapi")


def _refusal(error: Exception, servers: str) -> str:
    """Return why a client can't connect, as a sentence with its remedy."""
    refuses = f"Kafka at {servers} refuses ({error})"
    if _is_of_kerberos(error):
        return f"{refuses}: check your Kerberos ticket with klist, and sasl.kerberos.service.name."
    if isinstance(error, _REFUSALS):
        return f"{refuses}: check sasl.mechanism, and user and password in sasl.jaas.config."
    for pattern, message in _TLS_REFUSALS.items():
        if re.search(pattern, str(error)):
            return message.format(servers=servers, error=error)
    if _was_closed(error):
        return (
            f"Kafka at {servers} closes the connection: check the address and security.protocol; "
            "with a login, check sasl.mechanism, and user and password in sasl.jaas.config."
        )
    if isinstance(error, KafkaTimeoutError | KafkaConnectionError):
        return (
            f"no Kafka broker answers at {servers} within {ANSWER_SECONDS} s: check the address, "
            "that the broker is running (`python -m helpers.broker` starts one), and that the "
            "security settings match the broker's."
        )
    if isinstance(error, KafkaConfigurationError):
        return f"the settings for Kafka don't fit: {error}"
    return f"{refuses}: check the settings for Kafka."


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition is true; return False on timeout.

    Parameters
    ----------
    condition : callable
        Called repeatedly; Kafka connection errors are treated as False.
    seconds : float
        How long to wait.

    Examples
    --------
    >>> wait_until(lambda: True, seconds=1)
    True
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(KafkaError, OSError):
            if condition():
                return True
        time.sleep(0.05)
    return False


def admin_client(
    settings: Mapping[str, str], connect_seconds: int = ANSWER_SECONDS
) -> KafkaAdminClient:
    """Return an admin client of kafka-python whose requests time out after 15 s.

    Parameters
    ----------
    settings : mapping
        The client's settings by Kafka's names.
    connect_seconds : int
        How long it waits for a broker.

    Examples
    --------
    >>> from helpers.broker import LocalKafka
    >>> with LocalKafka() as kafka, admin_client(kafka.settings) as admin:
    ...     admin.list_topics()
    []
    """
    return KafkaAdminClient(
        **python_settings(settings), request_timeout_ms=ANSWER_SECONDS * 1000,
        bootstrap_timeout_ms=connect_seconds * 1000,
    )  # fmt: skip


def _has_leaders(admin: KafkaAdminClient, topic: str) -> bool:
    """Return whether every partition of a topic has a leader and so can be written to."""
    (description,) = admin.describe_topics([topic])
    partitions = description["partitions"]
    return bool(partitions) and all(partition["leader_id"] >= 0 for partition in partitions)
