"""Which offsets belong to a batch: planned with the JVM's Kafka client, apart from any stream."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from helpers.session import root_cause

# How long Kafka may take to answer a question of the planner.
ANSWER_SECONDS = 15

# What the planner settles itself, whatever the user's settings say: it reads no records, it never
# makes a topic by asking for it, and offsets are committed by the stream alone.
PLANNER_SETTINGS = {
    "key.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "value.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "enable.auto.commit": "false",
    "allow.auto.create.topics": "false",
}


_REMEDIES = {
    "TopicAuthorizationException": "the ACLs READ and DESCRIBE on the topic are needed",
    "GroupAuthorizationException": "the ACL READ on the consumer group is needed",
    "TimeoutException": "check that the broker runs and that the executors reach it",
}


class StreamError(RuntimeError):
    """The stream can't be planned or goes on no further; the message says why and what helps."""


class BrokerAwayError(StreamError):
    """Kafka gave no answer in time; it may do so later."""


@dataclass(frozen=True, order=True)
class TopicAndPartition:
    """One partition of a topic.

    Examples
    --------
    >>> TopicAndPartition("Machine_Learning", 0)
    TopicAndPartition(topic='Machine_Learning', partition=0)
    """

    topic: str
    partition: int


@dataclass(frozen=True, order=True)
class OffsetRange:
    """The records of a partition from one offset up to, but not including, another.

    Examples
    --------
    >>> OffsetRange("Machine_Learning", 0, fromOffset=10, untilOffset=25).count()
    15
    """

    topic: str
    partition: int
    fromOffset: int  # noqa: N815 (the name that the API had)
    untilOffset: int  # noqa: N815

    def topicAndPartition(self) -> TopicAndPartition:  # noqa: N802
        """Return the partition that the range is of."""
        return TopicAndPartition(self.topic, self.partition)

    def count(self) -> int:
        """Return the number of offsets in the range."""
        return self.untilOffset - self.fromOffset


class OffsetPlanner:
    """Decides which offsets of some topics belong to the next batch.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    topics : iterable of str
        The topics; all their partitions are read, new ones too, unless `from_offsets` names some.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. ``auto.offset.reset`` (``earliest``,
        ``latest`` by default) says where a partition starts for which the group has no offset yet.
    from_offsets : mapping of TopicAndPartition to int, optional
        The partitions to read, and at which offset each starts.

    Raises
    ------
    StreamError
        If a topic doesn't exist, or Kafka can't be reached, or refuses.

    Examples
    --------
    >>> planner = OffsetPlanner(spark, ["events"], {"bootstrap.servers": kafka.bootstrap_servers,
    ...                                             "auto.offset.reset": "earliest"})
    >>> planner.next_batch(max_per_partition=100)
    [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=100)]
    """

    def __init__(
        self,
        spark: SparkSession,
        topics: Iterable[str],
        settings: Mapping[str, str],
        from_offsets: Mapping[TopicAndPartition, int] | None = None,
    ) -> None:
        self._spark = spark
        self._jvm = spark._jvm
        self._topics = sorted(set(topics))
        self._settings = {"auto.offset.reset": "latest", **settings}
        self._fixed_partitions = set(from_offsets or ())
        self._positions: dict[TopicAndPartition, int] = dict(from_offsets or {})
        self._starts = dict(self._positions)
        self._ends: dict[TopicAndPartition, int] = {}
        self._java_partitions: dict[TopicAndPartition, Any] = {}
        self._lock = threading.RLock()  # a KafkaConsumer is for one thread at a time
        self._answer_time = self._jvm.java.time.Duration.ofSeconds(ANSWER_SECONDS)
        with self._asking():
            self._consumer = self._jvm.org.apache.kafka.clients.consumer.KafkaConsumer(
                _java_map(self._jvm, {**self._settings, **PLANNER_SETTINGS})
            )
        try:
            with self._asking():
                self._look()
        except BaseException:
            self.close()
            raise

    def next_batch(self, max_per_partition: int | None = None) -> list[OffsetRange]:
        """Return the ranges from where the last batch ended to where the topics end now.

        Parameters
        ----------
        max_per_partition : int, optional
            No more records than this of each partition.

        Returns
        -------
        list of OffsetRange
            Only ranges with records in them, sorted; none if nothing new has come.
        """
        with self._asking():
            self._look()
            ranges = []
            for partition, end in self._ends.items():
                start = self._positions[partition]
                until = end if max_per_partition is None else min(end, start + max_per_partition)
                if until > start:
                    ranges.append(OffsetRange(partition.topic, partition.partition, start, until))
                    self._positions[partition] = until
            return sorted(ranges)

    def commit(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Commit to the consumer group where each partition is to be read from next.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            The next offset of each partition. Without a ``group.id`` nothing happens.
        """
        if not self._settings.get("group.id"):
            return
        with self._asking():
            metadata = self._jvm.org.apache.kafka.clients.consumer.OffsetAndMetadata
            java_offsets = self._jvm.java.util.HashMap()
            for partition, offset in offsets.items():
                java_offsets.put(self._java_partition(partition), metadata(offset))
            self._consumer.commitSync(java_offsets, self._answer_time)

    def ends(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions ended when the last batch was planned."""
        return dict(self._ends)

    def starts(self) -> dict[TopicAndPartition, int]:
        """Return where the first batch began in each partition that is read."""
        return dict(self._starts)

    def close(self) -> None:
        """Let go of the connections to Kafka."""
        with self._lock:
            self._consumer.close(self._jvm.java.time.Duration.ofSeconds(1))

    def _look(self) -> None:
        """Find out where the partitions end now, and where the new ones among them begin."""
        partitions = sorted(self._fixed_partitions) or self._partitions()
        new = [partition for partition in partitions if partition not in self._positions]
        if new:
            starts = self._find_starts(new)
            self._positions.update(starts)
            self._starts = {**self._starts, **starts}
        ends = self._offsets(self._consumer.endOffsets, partitions)
        if not self._ends:
            self._check(self._positions, ends)
        # A new dictionary each time, so that `ends` needs no lock while Kafka is being asked.
        self._ends = ends

    def _check(
        self, starts: Mapping[TopicAndPartition, int], ends: Mapping[TopicAndPartition, int]
    ) -> None:
        """Raise `StreamError` where a partition no longer or not yet has the offset to begin at."""
        begins = self._offsets(self._consumer.beginningOffsets, list(ends))
        for partition, start in starts.items():
            first, end = begins[partition], ends[partition]
            if not first <= start <= end:
                raise StreamError(
                    f"{partition.topic}, partition {partition.partition}, is to be read from "
                    f"offset {start}, but holds {first} to {end}: the topic was made anew, or its "
                    "retention has deleted records that were not read. Begin with a new group.id, "
                    "or say where with fromOffsets."
                )

    def _partitions(self) -> list[TopicAndPartition]:
        """Return the partitions that the topics have now; Kafka numbers them from 0."""
        found = []
        for topic in self._topics:
            partitions = self._consumer.partitionsFor(topic, self._answer_time)
            if not partitions:
                raise StreamError(
                    f"topic {topic!r} doesn't exist at {self._servers()}: check its name, or "
                    "create it and write to it first."
                )
            found += [TopicAndPartition(topic, number) for number in range(len(partitions))]
        return found

    def _find_starts(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return where partitions begin that the stream hasn't read from yet."""
        committed = self._committed(partitions) if self._settings.get("group.id") else {}
        never_read = [partition for partition in partitions if partition not in committed]
        if not never_read:
            return committed
        # A partition that appears while the stream runs is read from its beginning: what was
        # written to it before it was noticed must not be lost.
        earliest = self._positions or self._settings["auto.offset.reset"] == "earliest"
        ask = self._consumer.beginningOffsets if earliest else self._consumer.endOffsets
        reset = self._offsets(ask, never_read)
        # Where a group begins is committed at once. Otherwise a stream that stops before a
        # partition had records would begin at its end anew, past what came in between.
        self.commit(reset)
        return {**committed, **reset}

    def _committed(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the group's offsets, for those of the partitions that it has one for."""
        found = self._offsets(self._consumer.committed, partitions)
        return {partition: offset.offset() for partition, offset in found.items() if offset}

    def _offsets(
        self, ask: Callable[[Any, Any], Any], partitions: list[TopicAndPartition]
    ) -> dict[TopicAndPartition, Any]:
        """Ask the consumer one of its questions about offsets."""
        question = self._jvm.java.util.HashSet()
        for partition in partitions:
            question.add(self._java_partition(partition))
        answer = ask(question, self._answer_time)
        return {partition: answer.get(self._java_partition(partition)) for partition in partitions}

    def _java_partition(self, partition: TopicAndPartition) -> Any:
        if partition not in self._java_partitions:
            self._java_partitions[partition] = self._jvm.org.apache.kafka.common.TopicPartition(
                partition.topic, partition.partition
            )
        return self._java_partitions[partition]

    def _servers(self) -> str:
        return self._settings["bootstrap.servers"]

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Talk to Kafka: one thread at a time, and each of Java's exceptions as one sentence."""
        try:
            with self._lock:
                use_added_jars(self._spark)
                yield
        except Py4JJavaError as error:
            raise self._explained(error) from None

    def _explained(self, error: Py4JJavaError) -> StreamError:
        """Return what a Java exception means for the user."""
        # KafkaConsumer's constructor wraps the cause in "Failed to construct kafka consumer".
        exception = root_cause(error)
        name, message = exception.getClass().getSimpleName(), exception.getMessage()
        if name == "TimeoutException":
            return BrokerAwayError(
                f"Kafka at {self._servers()} gave no answer within {ANSWER_SECONDS} s: check the "
                f"address, that the broker runs, and that the security settings are its own."
            )
        return StreamError(
            f"Kafka at {self._servers()} refuses: {message} ({name}){remedy(name)}."
        )


def remedy(error: str) -> str:
    """Return what helps against an error of Kafka's, as the rest of a sentence; '' if unknown.

    Parameters
    ----------
    error : str
        The name of Kafka's exception, or a line with the name in it.

    Examples
    --------
    >>> remedy("TopicAuthorizationException")
    ': the ACLs READ and DESCRIBE on the topic are needed'
    """
    for name, words in _REMEDIES.items():
        # Kafka's own: not a SocketTimeoutException, nor java.util.concurrent.TimeoutException.
        if re.search(rf"(?<![A-Za-z])(?<!concurrent\.){name}", error):
            return f": {words}"
    return ""


def use_added_jars(spark: SparkSession) -> None:
    """Have this thread's Java find the jars that were added to a running session (`ADD JAR`)."""
    loader = spark._jsparkSession.sharedState().jarClassLoader()
    spark._jvm.java.lang.Thread.currentThread().setContextClassLoader(loader)


def _java_map(jvm: Any, settings: Mapping[str, str]) -> Any:
    result = jvm.java.util.HashMap()
    for name, value in settings.items():
        result.put(name, value)
    return result
