"""Talks to Kafka through a consumer and an admin client in the driver's JVM, called by py4j.

They take the same settings as Spark's Kafka source, security included. The consumer reads no
records; it looks up offsets and commits them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from helpers.kafka_settings import ANSWER_SECONDS
from helpers.spark import JAVA_ERRORS, cause_name, guard_callbacks, hide_secrets, is_interrupt
from helpers.streaming.errors import StreamError, TopicRecreatedError, explained
from helpers.streaming.offsets import OffsetRange, TopicAndPartition, is_another
from helpers.streaming.settings import (
    check_names,
    java_map,
    modern_settings,
    settings_of,
    topic_names,
    use_added_jars,
)

_LOGGER = logging.getLogger(__name__)

# These override the user's settings: the client reads no records and never creates a topic by
# asking for it, and only the stream commits offsets.
CLIENT_SETTINGS = {
    "key.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "value.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "enable.auto.commit": "false",
    "allow.auto.create.topics": "false",
}

# The prefixes of a committed offset's metadata; the id of the topic follows. Nothing resumes from
# the offsets of a query, so a query may replace those of another one, but not those of a stream.
_TOPIC_ID = "topic-id:"
_QUERY = f"query {_TOPIC_ID}"

# Java's `Uuid.ZERO`: the id of each topic if the broker gives none.
_NO_ID = "A" * 22


@dataclass(frozen=True)
class Topic:
    """A topic, as Kafka describes it.

    Attributes
    ----------
    topic_id : str
        Its id, which differs from that of a deleted topic of the same name; empty if the broker
        has none, as before Kafka 2.8.
    partitions : list of TopicAndPartition
        All its partitions.
    """

    topic_id: str
    partitions: list[TopicAndPartition]


@dataclass(frozen=True)
class Committed:
    """A consumer group's committed offset for a partition.

    Attributes
    ----------
    offset : int
        The next offset to read.
    topic_id : str or None
        The id of the topic that the offset belongs to; None if another program committed it, empty
        if the broker had none.
    by_query : bool
        Whether a query committed it, only to show its progress.
    """

    offset: int
    topic_id: str | None
    by_query: bool


class KafkaClient:
    """Asks Kafka about topics, offsets and consumer groups, and commits offsets.

    Each request is answered within 15 s, or raises `BrokerAwayError`. Several threads may use a
    client.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.

    Raises
    ------
    StreamError
        If Kafka can't be reached or refuses access.
    ValueError
        If Kafka doesn't know one of the settings.

    Examples
    --------
    >>> client = KafkaClient(spark, {"bootstrap.servers": kafka.bootstrap_servers})
    >>> client.topics(["events"])["events"].partitions
    [TopicAndPartition(topic='events', partition=0)]
    >>> client.ends([TopicAndPartition("events", 0)])
    {TopicAndPartition(topic='events', partition=0): 100}
    >>> client.close()
    """

    def __init__(self, spark: SparkSession, settings: Mapping[str, str]) -> None:
        self._spark, self._jvm = spark, spark._jvm
        hide_secrets(spark)  # also in a session that `get_spark` has not seen
        guard_callbacks(spark)
        self.settings = {"auto.offset.reset": "latest", **settings}
        self._java_partitions: dict[TopicAndPartition, Any] = {}
        self._last_set: tuple[set[TopicAndPartition], Any] | None = None
        self._last_commit: tuple[dict[TopicAndPartition, Committed], Any] | None = None
        self._lock = threading.RLock()  # a KafkaConsumer allows one thread at a time
        self._answer_time = self._jvm.java.time.Duration.ofSeconds(ANSWER_SECONDS)
        with self._asking():
            check_names(spark, self.settings)
            clients = self._jvm.org.apache.kafka.clients
            consumers, admins = (
                settings_of(spark, self.settings, client) for client in ("consumer", "admin")
            )
            self._consumer = clients.consumer.KafkaConsumer(
                java_map(spark, {**consumers, **CLIENT_SETTINGS})
            )
            self._admin = clients.admin.Admin.create(java_map(spark, admins))

    def topics(
        self, names: Iterable[str], known_ids: Mapping[str, str] | None = None
    ) -> dict[str, Topic]:
        """Return topics by name, after comparing their ids with those known before.

        Raises
        ------
        StreamError
            If a topic doesn't exist.
        TopicRecreatedError
            If a topic has another id than before.
        """
        names, found = list(names), {}
        with self._asking():
            futures = self._admin.describeTopics(names).topicNameValues()
            for name in names:
                description = self._described(name, futures.get(name))
                partitions = [
                    TopicAndPartition(name, number)  # Kafka numbers them from 0
                    for number in range(description.partitions().size())
                ]
                topic_id = description.topicId().toString()
                found[name] = Topic("" if topic_id == _NO_ID else topic_id, partitions)
        for name, topic in found.items():
            if is_another((known_ids or {}).get(name), topic.topic_id):
                raise TopicRecreatedError(name)
        return found

    def topic_ids(
        self, names: Iterable[str], known_ids: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Return the ids of topics by name, after comparing them as `topics` does."""
        return {name: topic.topic_id for name, topic in self.topics(names, known_ids).items()}

    def begins(self, partitions: Iterable[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the first available offset of each partition."""
        return self._numbers(self._consumer.beginningOffsets, partitions)

    def ends(self, partitions: Iterable[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the offset after the last readable record of each partition."""
        return self._numbers(self._consumer.endOffsets, partitions)

    def last_written(self, partition: TopicAndPartition) -> int:
        """Return the offset after a partition's last record, also of an unfinished transaction."""
        asked = self._java_partition(partition)
        with self._asking():
            latest = self._jvm.org.apache.kafka.clients.admin.OffsetSpec.latest()
            found = self._admin.listOffsets(self._jvm.java.util.Map.of(asked, latest))
            return self._answer(found.partitionResult(asked)).offset()

    def without_deleted(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return planned ranges without offsets deleted since, after a warning about those.

        Parameters
        ----------
        ranges : iterable of OffsetRange
            The planned ranges.

        Raises
        ------
        StreamError
            If offsets were deleted, and ``auto.offset.reset`` is ``none``.

        Examples
        --------
        >>> client = KafkaClient(spark, {"bootstrap.servers": kafka.bootstrap_servers})
        >>> client.without_deleted([OffsetRange("events", 0, 0, 100)])
        [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=100)]
        >>> client.close()
        """
        planned = {part.topicAndPartition(): part for part in ranges}
        begins = self.begins(planned)
        kept = []
        for partition, part in planned.items():
            start = min(max(part.fromOffset, begins[partition]), part.untilOffset)
            if start > part.fromOffset:
                self.report_deleted(partition, part.fromOffset, start, start)
            if start < part.untilOffset:
                kept.append(replace(part, fromOffset=start))
        return kept

    def report_deleted(
        self, partition: TopicAndPartition, first: int, begin: int, after: int
    ) -> None:
        """Warn about offsets that are lost: deleted up to `begin`, and then skipped up to `after`.

        Raises
        ------
        StreamError
            If ``auto.offset.reset`` is ``none``, which makes a loss an error.
        """
        loss = (
            f"{after - first} events of {partition.topic}, partition {partition.partition} "
            f"(offsets {first} to {after - 1}) are lost: the topic's retention deleted them before "
            "they were read"
        )
        if after > begin:
            loss += f" up to offset {begin - 1}, and auto.offset.reset=latest skips the others"
        loss += "."
        if self.settings["auto.offset.reset"] == "none":
            raise StreamError(
                f"{loss} Raise its retention.ms; to resume after the loss, set auto.offset.reset "
                "to earliest."
            )
        _LOGGER.warning("%s", loss)

    def report_deleted_meanwhile(self, ranges: Iterable[OffsetRange]) -> None:
        """Warn about offsets that retention deleted while their batch was read."""
        planned = {part.topicAndPartition(): part for part in ranges}
        begins = self.begins(planned)
        for partition, part in planned.items():
            if begins[partition] > part.fromOffset:
                _LOGGER.warning(
                    "offsets %s to %s of %s, partition %s, were deleted while their batch was "
                    "read: some of them may be missing. Raise the topic's retention.ms.",
                    part.fromOffset, min(begins[partition], part.untilOffset) - 1, part.topic,
                    part.partition,
                )  # fmt: skip

    def committed(
        self, partitions: Iterable[TopicAndPartition]
    ) -> dict[TopicAndPartition, Committed]:
        """Return the group's committed offsets; partitions without one are left out."""
        if not self.settings.get("group.id"):
            return {}
        with self._asking():
            answer = self._consumer.committed(self._java_set(partitions), self._answer_time)
            # One call instead of three for each partition: usually, nobody else has committed.
            if self._last_commit is not None and answer.equals(self._last_commit[1]):
                return dict(self._last_commit[0])
            found = {part: answer.get(self._java_partition(part)) for part in partitions}
            return {
                partition: _committed(offset.offset(), offset.metadata())
                for partition, offset in found.items()
                if offset
            }

    def commit(
        self,
        offsets: Mapping[TopicAndPartition, int],
        topic_ids: Mapping[str, str],
        by_query: bool = False,
    ) -> None:
        """Commit the next offset of each partition to the consumer group.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            The offsets. Without a ``group.id``, nothing is committed.
        topic_ids : mapping of str to str
            The ids of the topics, which are stored with the offsets.
        by_query : bool
            Whether a query commits them, only to show its progress.
        """
        if not self.settings.get("group.id") or not offsets:
            return
        prefix = _QUERY if by_query else _TOPIC_ID
        with self._asking():
            metadata = self._jvm.org.apache.kafka.clients.consumer.OffsetAndMetadata
            java_offsets = self._jvm.java.util.HashMap()
            for partition, offset in offsets.items():
                java_offsets.put(
                    self._java_partition(partition),
                    metadata(offset, f"{prefix}{topic_ids[partition.topic]}"),
                )
            self._consumer.commitSync(java_offsets, self._answer_time)
            sent = {
                part: Committed(offset, topic_ids[part.topic], by_query)
                for part, offset in offsets.items()
            }
            self._last_commit = sent, java_offsets

    def members(self) -> list[str]:
        """Return the client ids of the group's live members; an empty list if there is no group."""
        group = self.settings.get("group.id")
        if not group:
            return []
        with self._asking():
            groups = self._admin.describeConsumerGroups(self._jvm.java.util.List.of(group))
            try:
                answer = self._answer(groups.describedGroups().get(group))
            except JAVA_ERRORS as error:
                if cause_name(error) == "GroupIdNotFoundException":
                    return []
                raise
            return sorted(member.clientId() for member in answer.members())

    def close(self) -> None:
        """Close the connections to Kafka."""
        # If Java has died, the connections are closed, and the reason is already being raised.
        with self._lock, contextlib.suppress(Py4JError, ConnectionError):
            second = self._jvm.java.time.Duration.ofSeconds(1)
            self._consumer.close(second)
            self._admin.close(second)

    def _described(self, name: str, future: Any) -> Any:
        try:
            return self._answer(future)
        except JAVA_ERRORS as error:
            kind = cause_name(error)
            if kind not in ("UnknownTopicOrPartitionException", "InvalidTopicException"):
                raise
            raise StreamError(
                f"topic {name!r} doesn't exist at {self.settings['bootstrap.servers']}: check its "
                "name, or create it and write to it first."
            ) from None

    def _answer(self, future: Any) -> Any:
        """Wait for an answer of the admin client."""
        return future.get(ANSWER_SECONDS, self._jvm.java.util.concurrent.TimeUnit.SECONDS)

    def _numbers(
        self, ask: Callable[[Any, Any], Any], partitions: Iterable[TopicAndPartition]
    ) -> dict[TopicAndPartition, int]:
        """Look up numbers with one of the consumer's methods.

        The answer comes as one text: a call to Java for each of a thousand partitions takes longer
        than Kafka does.
        """
        with self._asking():
            text = ask(self._java_set(partitions), self._answer_time).toString()
        found = {}
        for entry in text.strip("{}").split(", ") if len(text) > 2 else ():
            name, number = entry.rsplit("=", 1)
            topic, partition = name.rsplit("-", 1)
            found[TopicAndPartition(topic, int(partition))] = int(number)
        return {partition: found[partition] for partition in partitions}

    def _java_set(self, partitions: Iterable[TopicAndPartition]) -> Any:
        """Return a Java set of partitions; the last one again, if it has the same partitions."""
        wanted = set(partitions)
        if self._last_set is None or self._last_set[0] != wanted:
            partitions = [self._java_partition(partition) for partition in wanted]
            self._last_set = wanted, self._jvm.java.util.HashSet(partitions)
        return self._last_set[1]

    def _java_partition(self, partition: TopicAndPartition) -> Any:
        if partition not in self._java_partitions:
            self._java_partitions[partition] = self._jvm.org.apache.kafka.common.TopicPartition(
                partition.topic, partition.partition
            )
        return self._java_partitions[partition]

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Let one thread at a time talk to Kafka, and explain Java's exceptions."""
        try:
            with self._lock:
                use_added_jars(self._spark)
                yield
        except JAVA_ERRORS as error:
            if is_interrupt(error):
                raise  # Spark stops a query by an interrupt, and looks for it in the error
            raise explained(error, self.settings) from None


def topic_ids(
    spark: SparkSession, topics: Iterable[str], settings: Mapping[str, str]
) -> dict[str, str]:
    """Return the ids of topics by name; a topic that is created again has a new one.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    topics : iterable of str
        The topics.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.

    Raises
    ------
    StreamError
        If a topic doesn't exist, or Kafka can't be reached or refuses access.

    Examples
    --------
    >>> list(topic_ids(spark, ["events"], {"bootstrap.servers": kafka.bootstrap_servers}))
    ['events']
    """
    with contextlib.closing(KafkaClient(spark, modern_settings(settings))) as client:
        return client.topic_ids(topic_names(topics))


def check_partitions(
    partitions: Iterable[TopicAndPartition], topics: Mapping[str, Topic]
) -> None:
    """Raise `StreamError` for a partition that its topic doesn't have.

    Kafka would give no answer to a question about it.

    Parameters
    ----------
    partitions : iterable of TopicAndPartition
        The partitions.
    topics : mapping of str to Topic
        Their topics by name, as `KafkaClient.topics` returns them.

    Examples
    --------
    >>> events = Topic("id-1", [TopicAndPartition("events", 0), TopicAndPartition("events", 1)])
    >>> check_partitions([TopicAndPartition("events", 7)], {"events": events})
    Traceback (most recent call last):
    ...
    helpers.streaming.errors.StreamError: topic events has the partitions 0 to 1, not 7.
    """
    for partition in partitions:
        count = len(topics[partition.topic].partitions)
        if not 0 <= partition.partition < count:
            raise StreamError(
                f"topic {partition.topic} has the partitions 0 to {count - 1}, not "
                f"{partition.partition}."
            )


def _committed(offset: int, metadata: str) -> Committed:
    """Return a committed offset with what its metadata says about it."""
    for prefix in (_TOPIC_ID, _QUERY):
        if metadata.startswith(prefix):
            return Committed(offset, metadata.removeprefix(prefix), prefix == _QUERY)
    return Committed(offset, None, False)
