"""Send bad records to the dead-letter topics of their topics.

A dead letter has its record's key and value, and headers with the record's topic, partition and
offset and the reason. The dead-letter topic is checked, or created, before letters are sent, to
detect letters that it can't take: Kafka's client would fail the whole batch on each retry.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow
from py4j.java_gateway import JavaObject
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType, LongType

from helpers.kafka_settings import ANSWER_SECONDS
from helpers.spark import (
    JAVA_ERRORS,
    arrow_function,
    cause_message,
    cause_name,
    hide_secrets,
    summary,
)
from helpers.streaming import (
    StreamError,
    explained,
    java_map,
    modern_settings,
    settings_of,
    use_added_jars,
    without_secrets,
)

_LOGGER = logging.getLogger(__name__)

_CHECKED: set[str] = set()  # topics whose letters' retention this process has looked at

DEAD_LETTERS = ".dead-letter"  # suffix of the name of a dead-letter topic

_DEFAULT_LIMIT = 1_048_588  # Kafka's default max.message.bytes, if the topic's is unknown
_LEAST_RETENTION_MS = 7 * 24 * 3_600 * 1_000  # time to repair letters: Kafka's default, a week
_HEADERS_ROOM = 16 * 1024  # bytes; more than a letter's headers need
_OVERHEAD = 200  # the most that Kafka adds to a letter with six headers
_UNPACKED_LIMIT = 64 * 1024**2  # maximum size of a letter before compression
_CODEC = "zstd"  # compresses at least as well as whatever codec the producer used
_PLACES_LOGGED = 20

# An unavailable broker is noticed within seconds, and the batch is retried.
_TIMEOUTS = {
    "max.block.ms": "20000", "request.timeout.ms": "10000", "delivery.timeout.ms": "20000",
    "linger.ms": "5",
}  # fmt: skip
_LONGEST = 2**31 - 1  # maximum number of milliseconds in a Kafka setting

# Kafka's errors for which retrying later doesn't help.
_PERMANENT = (
    "RecordTooLargeException", "InvalidRecordException", "AuthorizationException",
    "UnknownTopicOrPartitionException", "InvalidTopicException", "PolicyViolationException",
    "ConfigException",
)  # fmt: skip
_NO_ADDRESS = "No resolvable bootstrap urls"  # a ConfigException, but DNS may resolve it later


class _LetterError(StreamError):
    """Dead letters can't be sent until the user changes something."""


@dataclass(frozen=True)
class LetterTopic:
    """The limits of a dead-letter topic.

    Attributes
    ----------
    limit : int
        The maximum size of a compressed message, in bytes.
    codec : str
        The compression codec: the topic's, else that in the settings, else zstd.
    """

    limit: int
    codec: str


def prepare_dead_letters(
    spark: SparkSession, topics: Iterable[str], settings: Mapping[str, str]
) -> dict[str, LetterTopic]:
    """Make sure that the dead letters of topics can be sent.

    A missing dead-letter topic is created with as many partitions and replicas as the source topic,
    for messages of the same size.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    topics : iterable of str
        The source topics.
    settings : mapping
        Settings of a Kafka client by Kafka's names.

    Returns
    -------
    dict of str to LetterTopic
        The dead-letter topics, by source topic.

    Raises
    ------
    StreamError
        If a topic is missing and can't be created, or can't be written to, or if Kafka's producer
        rejects the settings.
    BrokerAwayError
        If Kafka doesn't answer within 15 s.

    Examples
    --------
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers}
    >>> prepare_dead_letters(spark, ["events"], settings)
    {'events': LetterTopic(limit=1064972, codec='zstd')}
    """
    settings = modern_settings(settings)
    use_added_jars(spark)
    try:
        with contextlib.closing(_Admin(spark, settings)) as admin:
            places = {topic: admin.letter_topic(topic) for topic in topics}
            for topic, place in places.items():
                admin.check_producer(topic, _producer_settings(settings, place))
    except JAVA_ERRORS as error:
        raise explained(error, settings) from None
    return places


def send_dead_letters(
    bad: DataFrame, settings: Mapping[str, str], topic_ids: Mapping[str, str | None]
) -> int:
    """Send bad records to their dead-letter topics, with their keys and values.

    A retried batch sends its dead letters again; the headers identify duplicates. A letter that
    can't be sent stays in the sink's files and is logged, and doesn't stop the stream.

    Parameters
    ----------
    bad : pyspark.sql.DataFrame
        Records with ``topic``, ``partition``, ``offset``, ``event_time`` and ``bad``, a struct of
        ``key``, ``value`` and ``reason``; large ones as `PartFiles.read_row_by_row` reads them.
    settings : mapping
        Settings of a Kafka client by Kafka's names.
    topic_ids : mapping
        The Kafka ids of the batch's topics, by topic name; None for an unknown id.

    Returns
    -------
    int
        The number of letters that were not sent.

    Raises
    ------
    BrokerAwayError
        If Kafka doesn't answer: the letters can be sent later.
    """
    settings = modern_settings(settings)
    unsent = 0
    for topic, topic_id in topic_ids.items():
        letters = _letters(bad.where(F.col("topic") == topic), topic_id)
        try:
            place = prepare_dead_letters(bad.sparkSession, [topic], settings)[topic]
            unsent += _send_what_fits(letters, place, settings)
        except Exception as error:
            reason = _permanent_reason(error)
            if reason is None:
                raise
            count = letters.count()
            unsent += count
            if count:
                _LOGGER.error(
                    "%s bad records of %s are in the sink's files only: %s", count, topic, reason
                )
    return unsent


class _Admin:
    """An admin client for topics, with a deadline for each call."""

    def __init__(self, spark: SparkSession, settings: Mapping[str, str]) -> None:
        self._spark = spark
        self._jvm = spark._jvm
        self._clients = spark._jvm.org.apache.kafka.clients.admin
        self._config = spark._jvm.org.apache.kafka.common.config.ConfigResource
        self._given = settings
        deadlines = {
            "request.timeout.ms": str(ANSWER_SECONDS * 1000),
            "default.api.timeout.ms": str(ANSWER_SECONDS * 1000),
        }
        known = settings_of(spark, settings, "admin")
        self._client = self._clients.Admin.create(java_map(spark, {**known, **deadlines}))

    def close(self) -> None:
        """Close the connections to Kafka."""
        self._client.close(self._jvm.java.time.Duration.ofSeconds(1))

    def letter_topic(self, topic: str) -> LetterTopic:
        """Return the limits of a topic's dead-letter topic, creating it if necessary."""
        letters = topic + DEAD_LETTERS
        try:
            found = self._describe(letters) or self._create(letters, topic)
        except JAVA_ERRORS as error:
            if not _is_refusal(error):
                raise
            raise _LetterError(
                f"the dead letters of {topic} can't be sent: the ACLs WRITE and DESCRIBE on the "
                f"topic {letters} are needed, and CREATE unless it exists."
            ) from None
        allowed = found.authorizedOperations()
        if allowed and "WRITE" not in {operation.name() for operation in allowed}:
            raise _LetterError(
                f"the dead letters of {topic} can't be sent: the ACL WRITE on the topic {letters} "
                "is needed."
            )
        config = self._topic_config(letters)
        if "compact" in config.get("cleanup.policy", ""):
            raise _LetterError(
                f"the topic {letters} is compacted, so dead letters would be lost: set its "
                "cleanup.policy to delete."
            )
        self._check_retention(topic, config)
        codec = config.get("compression.type", "producer")
        if codec == "producer":
            codec = self._given.get("compression.type", _CODEC)
        limit = int(config.get("max.message.bytes", _DEFAULT_LIMIT))
        return LetterTopic(limit, "none" if codec == "uncompressed" else codec)

    def _check_retention(self, topic: str, config: Mapping[str, str]) -> None:
        """Warn once if Kafka deletes the letters of a topic before their records."""
        if topic in _CHECKED:
            return
        _CHECKED.add(topic)
        records = self._topic_config(topic)
        if not records or not config:
            return
        least, kept = _retention(records), _retention(config)
        is_short = kept != -1 and (least == -1 or kept < least)
        if is_short or config.get("retention.bytes", "-1") != "-1":
            _LOGGER.warning(
                "%s keeps dead letters for a shorter time than %s keeps its records, so a replay "
                "may send a record back twice: set its retention.ms to %s, and its retention.bytes "
                "to -1.",
                topic + DEAD_LETTERS, topic, least,
            )  # fmt: skip

    def check_producer(self, topic: str, settings: Mapping[str, str]) -> None:
        """Raise `StreamError` if Kafka's producer rejects the settings for a topic's letters."""
        settings = _options(self._spark, settings)
        serializer = "org.apache.kafka.common.serialization.ByteArraySerializer"
        for part in ("key", "value"):
            settings[f"{part}.serializer"] = serializer
        try:
            producer = self._jvm.org.apache.kafka.clients.producer.KafkaProducer(
                java_map(self._spark, settings)
            )
        except JAVA_ERRORS as error:
            message = cause_message(error)
            if cause_name(error) != "ConfigException" or _NO_ADDRESS in message:
                raise
            raise _LetterError(
                f"the dead letters of {topic} can't be sent: "
                f"{without_secrets(message, settings).rstrip('.')}. Correct these settings of "
                "Kafka's producer."
            ) from None
        producer.close(self._jvm.java.time.Duration.ZERO)

    def _describe(self, topic: str) -> JavaObject | None:
        """Return Kafka's description of a topic; None if the topic doesn't exist."""
        options = self._clients.DescribeTopicsOptions().includeAuthorizedOperations(True)
        names = self._jvm.java.util.List.of(topic)
        found = self._client.describeTopics(names, options).topicNameValues().get(topic)
        try:
            return self._answer(found)
        except JAVA_ERRORS as error:
            if cause_name(error) != "UnknownTopicOrPartitionException":
                raise
            return None

    def _create(self, letters: str, topic: str) -> JavaObject:
        """Create a topic for the letters of `topic`; return its description."""
        source = self._describe(topic)
        if source is None:
            raise _LetterError(
                f"topic {topic!r} doesn't exist: check its name, or create it and write to it "
                "first."
            )
        partitions = source.partitions()
        replicas = self._jvm.java.lang.Short(partitions.get(0).replicas().size())
        new = self._clients.NewTopic(letters, partitions.size(), replicas)
        new = new.configs(java_map(self._spark, self._letters_config(topic)))
        try:
            self._answer(self._client.createTopics(self._jvm.java.util.List.of(new)).all())
        except JAVA_ERRORS as error:
            if _is_refusal(error) or cause_name(error) == "TimeoutException":
                raise
            if cause_name(error) != "TopicExistsException":  # raised if another process was faster
                reason = f"{cause_message(error)} ({cause_name(error)})"
                raise StreamError(f"the topic {letters} can't be created: {reason}") from None
        return self._describe_new(letters)

    def _letters_config(self, topic: str) -> dict[str, str]:
        """Return the settings of a topic of letters, which are kept as long as their records.

        While a record can be read again, the replay recognizes by its letter that it was sent back.
        """
        found = self._topic_config(topic)
        limit = found.get("max.message.bytes")
        settings = {"retention.bytes": "-1"} if found else {}
        if limit:
            settings["max.message.bytes"] = str(int(limit) + _HEADERS_ROOM)
        if "retention.ms" in found:
            kept = _retention(found)
            settings["retention.ms"] = str(kept if kept == -1 else max(kept, _LEAST_RETENTION_MS))
        return settings

    def _describe_new(self, topic: str) -> JavaObject:
        """Return the description of a new topic, once the brokers' metadata includes it."""
        for _ in range(ANSWER_SECONDS * 10):
            found = self._describe(topic)
            if found is not None:
                return found
            time.sleep(0.1)
        raise StreamError(f"the topic {topic} was created, but Kafka doesn't list it: try again.")

    def _topic_config(self, topic: str) -> dict[str, str]:
        """Return a topic's settings; none if this user is not authorized to read them."""
        resource = self._config(self._config.Type.TOPIC, topic)
        found = self._client.describeConfigs(self._jvm.java.util.List.of(resource)).values()
        try:
            entries = self._answer(found.get(resource)).entries()
        except JAVA_ERRORS as error:
            if not _is_refusal(error):
                raise
            return {}
        entries = self._jvm.java.util.ArrayList(entries)
        return {entry.name(): entry.value() for entry in entries}

    def _answer(self, future: JavaObject) -> JavaObject:
        return future.get(ANSWER_SECONDS, self._jvm.java.util.concurrent.TimeUnit.SECONDS)


def _letters(bad: DataFrame, topic_id: str | None) -> DataFrame:
    """Return a topic's bad records as messages, with headers that locate the records."""
    values = {
        "topic": F.col("topic"),
        "topic-id": F.lit(topic_id),
        "partition": F.col("partition"),
        "offset": F.col("offset"),
        "timestamp": F.unix_millis("event_time"),
        "reason": F.col("bad.reason"),
    }
    if not topic_id:
        del values["topic-id"]
    # Headers in the form that Spark's Kafka sink expects.
    headers = [
        F.struct(F.lit(name).alias("key"), value.cast("string").cast("binary").alias("value"))
        for name, value in values.items()
    ]
    return bad.select(
        F.struct("topic", "partition", "offset").alias("source"),
        F.concat("topic", F.lit(DEAD_LETTERS)).alias("topic"),
        "bad.key",
        "bad.value",
        F.array(*headers).alias("headers"),
    )


def _send_what_fits(letters: DataFrame, place: LetterTopic, settings: Mapping[str, str]) -> int:
    """Send the letters that their topic accepts, and return how many are too large."""
    sized = letters.withColumn("size", _size())
    large = sized.where(F.col("size") > place.limit)
    checked = large.select("source.*", "size", _fits(place).alias("fits")).collect()
    unsent = [letter for letter in checked if not letter.fits]
    messages = sized.where(F.col("size") <= place.limit)
    if len(unsent) < len(checked):
        messages = messages.union(large.where(_fits(place)))
    _send(messages.drop("source", "size").coalesce(1), _producer_settings(settings, place))
    for letter in unsent[:_PLACES_LOGGED]:
        _LOGGER.error(
            "the bad record at %s, partition %s, offset %s is in the sink's files only: it is too "
            "large (%s bytes) for %s%s, which takes %s",
            letter.topic, letter.partition, letter.offset, letter.size, letter.topic, DEAD_LETTERS,
            place.limit,
        )  # fmt: skip
    if len(unsent) > _PLACES_LOGGED:
        _LOGGER.error(
            "%s more bad records are in the sink's files only: they are too large",
            len(unsent) - _PLACES_LOGGED,
        )
    return len(unsent)


def _size() -> Column:
    """Return an upper bound of a letter's size in bytes, before compression."""
    parts = ("key", "value", F.to_json("headers"))  # JSON has Base64, so it is an overestimate
    sizes = (F.coalesce(F.octet_length(part), F.lit(0)) for part in parts)
    return sum(sizes, F.lit(_OVERHEAD).cast("bigint"))


def _fits(place: LetterTopic) -> Column:
    """Return whether a letter that is too large fits when it is compressed."""
    if place.codec == "none":
        return F.lit(False)
    codec = place.codec
    packed = arrow_function(
        lambda contents: _packed_sizes(contents, codec), BinaryType(), LongType()
    )
    content = F.concat(*(F.coalesce(F.col(name), F.lit(b"")) for name in ("key", "value")))
    unpacked = F.when(F.col("size") <= _room(place), content)
    # The margin exceeds the difference from Kafka's own compression.
    return F.coalesce(packed(unpacked) * 1.02 + _HEADERS_ROOM <= place.limit, F.lit(False))


def _packed_sizes(contents: pyarrow.Array, codec: str) -> pyarrow.Array:
    """Return the compressed size of each content in bytes."""
    sizes = (
        len(pyarrow.compress(each.as_buffer(), codec=codec)) if each.is_valid else None
        for each in contents
    )
    return pyarrow.array(sizes, pyarrow.int64())


def _room(place: LetterTopic) -> int:
    """Return the maximum size of a letter in bytes, before compression."""
    return max(place.limit, _UNPACKED_LIMIT)


def _producer_settings(settings: Mapping[str, str], place: LetterTopic) -> dict[str, str]:
    """Return a producer's settings for a dead-letter topic."""
    given = {**_TIMEOUTS, **settings, "compression.type": place.codec}
    for name in ("max.request.size", "buffer.memory"):
        given[name] = str(max(_room(place) + _HEADERS_ROOM, _number(given, name)))
    # Kafka rejects a delivery time-out shorter than a single request may take.
    least = min(_number(given, "request.timeout.ms") + _number(given, "linger.ms"), _LONGEST)
    given["delivery.timeout.ms"] = str(max(least, _number(given, "delivery.timeout.ms")))
    return given


def _number(settings: Mapping[str, str], name: str) -> int:
    """Return a numeric setting; 0 if it isn't given."""
    try:
        return int(settings.get(name, 0))
    except ValueError:
        raise _LetterError(
            f"the setting {name} is {settings[name]!r}: it must be a whole number."
        ) from None


def _permanent_reason(error: Exception) -> str | None:
    """Return why letters can never be sent; None if a retry may help."""
    text = str(error)
    if isinstance(error, _LetterError):
        return text
    if _NO_ADDRESS in text or not any(name in text for name in _PERMANENT):
        return None
    return summary(error)


def _retention(config: Mapping[str, str]) -> int:
    """Return for how many milliseconds a topic keeps its records; -1 if it deletes none by age."""
    is_deleted = "delete" in (config.get("cleanup.policy") or "")
    return int(config.get("retention.ms") or -1) if is_deleted else -1


def _is_refusal(error: Exception) -> bool:
    return cause_name(error).endswith("AuthorizationException")


def _send(messages: DataFrame, settings: Mapping[str, str]) -> None:
    """Write records to Kafka with Spark's Kafka sink."""
    spark = messages.sparkSession
    use_added_jars(spark)
    hide_secrets(spark)
    options = {f"kafka.{name}": value for name, value in _options(spark, settings).items()}
    messages.write.format("kafka").options(**options).save()


def _options(spark: SparkSession, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the producer in Spark's Kafka sink accepts."""
    return {
        name: value
        for name, value in settings_of(spark, settings, "producer").items()
        if name != "transactional.id" and not name.endswith(".serializer")
    }
