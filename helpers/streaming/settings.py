"""A stream's settings, by Kafka's names: one dictionary for the planner and Spark's source."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from pyspark.sql import SparkSession

from helpers.kafka_settings import check_address, check_protocol

ZOOKEEPER_PORT = 2181

_LOGGER = logging.getLogger(__name__)

# Settings of Kafka 0.8's consumer, with their present names. None means that a setting has no
# effect: it was for ZooKeeper, receivers, or consumers that share partitions.
OLD_NAMES = {
    "metadata.broker.list": "bootstrap.servers",
    "auto.commit.enable": "enable.auto.commit",
    "fetch.message.max.bytes": "max.partition.fetch.bytes",
    "fetch.wait.max.ms": "fetch.max.wait.ms",
    "socket.receive.buffer.bytes": "receive.buffer.bytes",
    "socket.timeout.ms": "request.timeout.ms",
    "refresh.leader.backoff.ms": "retry.backoff.ms",
    **dict.fromkeys((
        "zookeeper.connect", "zookeeper.connection.timeout.ms", "zookeeper.session.timeout.ms",
        "zookeeper.sync.time.ms", "consumer.id", "consumer.timeout.ms", "num.consumer.fetchers",
        "queued.max.message.chunks", "partition.assignment.strategy", "rebalance.backoff.ms",
        "rebalance.max.retries", "offsets.storage", "offsets.channel.backoff.ms",
        "offsets.channel.socket.timeout.ms", "offsets.commit.max.retries", "dual.commit.enabled",
    )),
}  # fmt: skip
OLD_RESETS = {"smallest": "earliest", "largest": "latest"}
_RESETS = ("earliest", "latest", "none")

# Kafka's classes that list the settings of its clients.
_CONFIGS = {
    "consumer": "consumer.ConsumerConfig",
    "producer": "producer.ProducerConfig",
    "admin": "admin.AdminClientConfig",
}


def modern_settings(kafka_params: Mapping[str, str]) -> dict[str, str]:
    """Return settings with the names and values of today's Kafka.

    Parameters
    ----------
    kafka_params : mapping
        Settings of `KafkaConsumer`; those of Kafka 0.8 (``metadata.broker.list``; ``smallest`` and
        ``largest`` as ``auto.offset.reset``) are translated, or dropped with a warning if nothing
        replaces them. A value may be a list or bytes; None means that the setting is not set.

    Raises
    ------
    ValueError
        If ``bootstrap.servers`` is missing or has no port, or ``auto.offset.reset`` or
        ``enable.auto.commit`` is invalid.

    Examples
    --------
    >>> modern_settings({"metadata.broker.list": "127.0.0.1:9092", "auto.offset.reset": "largest"})
    {'auto.offset.reset': 'latest', 'bootstrap.servers': '127.0.0.1:9092'}
    """
    settings: dict[str, str] = {}
    for name in sorted(kafka_params, key=OLD_NAMES.__contains__):  # today's names first
        today, value = OLD_NAMES.get(name, name), kafka_params[name]
        if today is None:
            _LOGGER.warning(
                "%s has no effect: the stream needs no ZooKeeper, has no receiver, and assigns its "
                "partitions itself.", name,
            )  # fmt: skip
        elif value is not None:
            settings.setdefault(today, as_text(value).strip())  # as Kafka's clients do
    if not settings.get("bootstrap.servers"):
        raise ValueError(
            "kafkaParams has no 'bootstrap.servers': add the brokers' addresses, such as "
            "{'bootstrap.servers': '127.0.0.1:9092'}."
        )
    check_address(settings["bootstrap.servers"])
    check_protocol(settings)
    reset = settings.get("auto.offset.reset", "latest")
    settings["auto.offset.reset"] = OLD_RESETS.get(reset, reset)
    if settings["auto.offset.reset"] not in _RESETS:
        raise ValueError(
            f"'auto.offset.reset' is {reset!r}: it must be 'earliest', 'latest' or 'none'."
        )
    if (commits := settings.get("enable.auto.commit")) is not None:
        settings["enable.auto.commit"] = commits.lower()
        if commits.lower() not in ("true", "false"):
            raise ValueError(f"'enable.auto.commit' is {commits!r}: it must be 'true' or 'false'.")
    return settings


def topic_names(topics: str | bytes | Iterable[str | bytes]) -> list[str]:
    """Return topics as a list of names; a string is the name of one topic.

    Examples
    --------
    >>> topic_names("events"), topic_names([b"events", "others"])
    (['events'], ['events', 'others'])
    """
    return [as_text(name) for name in ([topics] if isinstance(topics, str | bytes) else topics)]


def as_text(value: object) -> str:
    """Return a setting's value as text in Kafka's notation.

    Examples
    --------
    >>> as_text(True), as_text(["one:9092", "two:9092"]), as_text(b"scoring")
    ('true', 'one:9092,two:9092', 'scoring')
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | tuple | set):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_names(spark: SparkSession, settings: Mapping[str, str]) -> None:
    """Raise `ValueError` for a setting that none of Kafka's clients knows, and all would ignore.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    settings : mapping
        Settings by Kafka's names.

    Examples
    --------
    >>> check_names(spark, {"group.ids": "scoring"})
    Traceback (most recent call last):
    ...
    ValueError: Kafka's clients have no setting 'group.ids': did you mean 'group.id'?
    """
    known = set().union(*(_names(spark, client) for client in _CONFIGS))
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]!r}?" if near else ": remove it."
            raise ValueError(f"Kafka's clients have no setting {name!r}{hint}")


def settings_of(spark: SparkSession, settings: Mapping[str, str], client: str) -> dict[str, str]:
    """Return only the settings that one of Kafka's clients knows.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    settings : mapping
        Settings of several clients by Kafka's names.
    client : str
        ``"consumer"``, ``"producer"`` or ``"admin"``.

    Examples
    --------
    >>> settings_of(spark, {"client.id": "scoring", "max.request.size": "5000000"}, "consumer")
    {'client.id': 'scoring'}
    """
    known = _names(spark, client)
    return {name: value for name, value in settings.items() if name in known}


def without_group(settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings without the ``group.id``.

    Examples
    --------
    >>> without_group({"group.id": "scoring", "client.id": "scoring"})
    {'client.id': 'scoring'}
    """
    return {name: value for name, value in settings.items() if name != "group.id"}


def java_map(spark: SparkSession, settings: Mapping[str, str]) -> Any:
    """Return settings as a Java map, as Kafka's Java clients take them."""
    return spark._jvm.java.util.HashMap(settings)


def use_added_jars(spark: SparkSession) -> None:
    """Let this thread's Java find the jars that were added to a running session (`ADD JAR`)."""
    loader = spark._jsparkSession.sharedState().jarClassLoader()
    spark._jvm.java.lang.Thread.currentThread().setContextClassLoader(loader)


def _names(spark: SparkSession, client: str) -> set[str]:
    """Return the names of the settings that a client knows."""
    return set(getattr(spark._jvm, f"org.apache.kafka.clients.{_CONFIGS[client]}").configNames())
