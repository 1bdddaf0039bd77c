"""Administration of a broker: topics, record counts, users and their ACLs."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from kafka.errors import KafkaError, TopicAlreadyExistsError

from helpers.broker.security import jaas, new_password, python_settings
from helpers.broker.server import START_SECONDS, BrokerError
from helpers.kafka_settings import ANSWER_SECONDS, check_address


class BrokerAdmin(abc.ABC):
    """Administers a broker through Kafka clients; a subclass defines how they connect."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, str]:
        """Client settings of the administrator, by Kafka's names."""

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
        with _admin(self.settings) as admin:
            with contextlib.suppress(TopicAlreadyExistsError):
                admin.create_topics({name: topic})
            if not wait_until(lambda: _has_leaders(admin, name), START_SECONDS):
                raise BrokerError(f"topic {name} has no leader after {START_SECONDS} s.")

    def add_user(self, name: str) -> dict[str, str]:
        """Add a user with a new password to a secured broker, and return client settings.

        Parameters
        ----------
        name : str
            The user's name. A new user has no permissions; see `allow`.

        Returns
        -------
        dict of str to str
            Settings by Kafka's names. `helpers.broker.python_settings` converts them to arguments
            of kafka-python.

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
        password = new_password()
        user = UserScramCredentialUpsertion(name, ScramMechanism.SCRAM_SHA_512, password)
        with _admin(self.settings) as admin:
            refusals = admin.alter_user_scram_credentials([user])
        if refusals.get(name):
            raise BrokerError(f"user {name!r} can't be added: {refusals[name]}.")
        return {**self.settings, "sasl.jaas.config": jaas(name, password)}

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
        with _admin(self.settings) as admin:
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
        with _admin(self.settings) as admin:
            return sorted(name for name in admin.list_topics() if not name.startswith("__"))


def count_records(bootstrap_servers: str, topic: str) -> dict[int, int]:
    """Return the number of records in each partition; empty if the topic doesn't exist.

    Parameters
    ----------
    bootstrap_servers : str
        Addresses of brokers, ``host:port`` separated by commas.
    topic : str
        The topic's name.

    Returns
    -------
    dict of int to int
        Number of offsets in each partition, by partition number.

    Raises
    ------
    BrokerError
        If no broker answers within 15 s.
    ValueError
        If the address has no port.

    Examples
    --------
    >>> from helpers.broker import LocalKafka
    >>> with LocalKafka() as kafka:
    ...     kafka.create_topic("events", partitions=2)
    ...     count_records(kafka.bootstrap_servers, "events")
    {0: 0, 1: 0}
    """
    check_address(bootstrap_servers)
    milliseconds = ANSWER_SECONDS * 1000
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=bootstrap_servers.split(","), bootstrap_timeout_ms=milliseconds
        )
        with contextlib.closing(consumer):
            numbers = consumer.partitions_for_topic(topic) or ()
            partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
            firsts, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    except KafkaError as error:
        raise BrokerError(
            f"no Kafka broker answers at {bootstrap_servers} within {ANSWER_SECONDS} s: check the "
            "address, and that the broker is running."
        ) from error
    return {part.partition: ends[part] - firsts[part] for part in partitions}


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


def _admin(settings: Mapping[str, str]) -> KafkaAdminClient:
    """Return an admin client whose requests time out after 5 s."""
    return KafkaAdminClient(
        **python_settings(settings), request_timeout_ms=5_000, bootstrap_timeout_ms=2_000
    )


def _has_leaders(admin: KafkaAdminClient, topic: str) -> bool:
    """Return whether every partition of a topic has a leader and so can be written to."""
    (description,) = admin.describe_topics([topic])
    partitions = description["partitions"]
    return bool(partitions) and all(partition["leader_id"] >= 0 for partition in partitions)
