"""Which offsets belong to a batch: planned with the JVM's Kafka client, apart from any stream."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from helpers.session import root_cause
from helpers.streaming.errors import ANSWER_SECONDS, StreamError, explained
from helpers.streaming.offsets import OffsetRange, TopicAndPartition
from helpers.streaming.settings import check_names, java_map, use_added_jars

_LOGGER = logging.getLogger(__name__)

# What the planner settles itself, whatever the user's settings say: it reads no records, it never
# makes a topic by asking for it, and offsets are committed by the stream alone.
PLANNER_SETTINGS = {
    "key.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "value.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "enable.auto.commit": "false",
    "allow.auto.create.topics": "false",
}

# From how many offsets of each partition are left to how many of them the next batch may take.
Limit = Callable[[Mapping[TopicAndPartition, int]], Mapping[TopicAndPartition, int]]


class OffsetPlanner:
    """Decides which offsets of some topics belong to the next batch.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    topics : iterable of str
        The topics; all their partitions are read, unless `from_offsets` names some. New ones are
        noticed after ``metadata.max.age.ms`` (Kafka's default: 5 minutes) at the latest, and are
        read from their beginning.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. ``auto.offset.reset`` (``earliest``,
        ``latest``, ``none``) says where a partition starts for which the group has no offset, or
        whose records were deleted before they were read.
    from_offsets : mapping of TopicAndPartition to int, optional
        The partitions to read, and at which offset each starts.
    positions : mapping of TopicAndPartition to int, optional
        Where to go on: where an earlier planner of the same stream stopped, by `positions`, or what
        a sink has. What the group has committed is not asked then, not even if there is none yet.

    Raises
    ------
    StreamError
        If a topic doesn't exist, Kafka can't be reached, or refuses, or the group has members.
    ValueError
        If Kafka doesn't know one of the settings.

    Examples
    --------
    >>> planner = OffsetPlanner(spark, ["events"], {"bootstrap.servers": kafka.bootstrap_servers,
    ...                                             "auto.offset.reset": "earliest"})
    >>> planner.next_batch(lambda left: {partition: 60 for partition in left})
    [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=60)]
    >>> planner.next_batch()
    [OffsetRange(topic='events', partition=0, fromOffset=60, untilOffset=100)]
    """

    def __init__(
        self,
        spark: SparkSession,
        topics: Iterable[str],
        settings: Mapping[str, str],
        from_offsets: Mapping[TopicAndPartition, int] | None = None,
        positions: Mapping[TopicAndPartition, int] | None = None,
    ) -> None:
        self._spark = spark
        self._jvm = spark._jvm
        self._topics = sorted(set(topics))
        self._settings = {"auto.offset.reset": "latest", **settings}
        self._fixed_partitions = set(from_offsets or ())
        self._positions: dict[TopicAndPartition, int] = dict(positions or from_offsets or {})
        self._starts = {} if positions else dict(self._positions)
        self._asks_group = bool(self._settings.get("group.id")) and positions is None
        self._java_partitions: dict[TopicAndPartition, Any] = {}
        self._lock = threading.RLock()  # a KafkaConsumer is for one thread at a time
        self._answer_time = self._jvm.java.time.Duration.ofSeconds(ANSWER_SECONDS)
        with self._asking():
            check_names(spark, self._settings)
            self._consumer = self._jvm.org.apache.kafka.clients.consumer.KafkaConsumer(
                java_map(spark, {**self._settings, **PLANNER_SETTINGS})
            )
        try:
            with self._asking():
                self._check_group()
                self._look()
        except BaseException:
            self.close()
            raise

    def next_batch(self, limit: Limit | None = None) -> list[OffsetRange]:
        """Return the ranges from where the last batch ended to where the topics end now.

        Parameters
        ----------
        limit : callable, optional
            Is told how many offsets of each partition are left, and returns how many of them the
            batch may have.

        Returns
        -------
        list of OffsetRange
            Only ranges with records in them, sorted; none if nothing new has come.

        Raises
        ------
        StreamError
            If Kafka refuses, or offsets were deleted and ``auto.offset.reset`` is ``none``.
        BrokerAwayError
            If Kafka gives no answer within 15 s.
        """
        with self._asking():
            left = {
                partition: end - self._positions[partition]
                for partition, end in self._look().items()
            }
            most = left if limit is None else limit(left)
            ranges = []
            for partition, count in left.items():
                start = self._positions[partition]
                until = start + min(count, most[partition])
                if until > start:
                    ranges.append(OffsetRange(partition.topic, partition.partition, start, until))
                    self._positions[partition] = until
                    left[partition] = count - (until - start)
            self._unread = sum(left.values())
            return sorted(ranges)

    def still_there(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return planned ranges without what retention has deleted since, after a warning.

        Parameters
        ----------
        ranges : iterable of OffsetRange
            What was planned.

        Raises
        ------
        StreamError
            If something was deleted, and ``auto.offset.reset`` is ``none``.

        Examples
        --------
        >>> planner = OffsetPlanner(spark, ["events"], {
        ...     "bootstrap.servers": kafka.bootstrap_servers})
        >>> planner.still_there([OffsetRange("events", 0, 0, 100)])
        [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=100)]
        """
        planned = {part.topicAndPartition(): part for part in ranges}
        with self._asking():
            begins = self._offsets(self._consumer.beginningOffsets, list(planned))
        kept = []
        for partition, part in planned.items():
            start = min(max(part.fromOffset, begins[partition]), part.untilOffset)
            if start > part.fromOffset:
                self._tell_of_loss(partition, part.fromOffset, start)
            if start < part.untilOffset:
                kept.append(OffsetRange(part.topic, part.partition, start, part.untilOffset))
        return kept

    def commit(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Commit to the consumer group where each partition is to be read from next.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            The next offset of each partition. Without a ``group.id`` nothing happens.
        """
        if not self._settings.get("group.id") or not offsets:
            return
        with self._asking():
            metadata = self._jvm.org.apache.kafka.clients.consumer.OffsetAndMetadata
            java_offsets = self._jvm.java.util.HashMap()
            for partition, offset in offsets.items():
                java_offsets.put(self._java_partition(partition), metadata(offset))
            self._consumer.commitSync(java_offsets, self._answer_time)

    def unread(self) -> int:
        """Return how many offsets were left when the last batch was planned."""
        return self._unread

    def ends(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions ended when the last batch was planned."""
        return dict(self._ends)

    def starts(self) -> dict[TopicAndPartition, int]:
        """Return where the first batch began in each partition that is read.

        Nothing of the partitions whose reading goes on at the `positions` of an earlier planner.
        """
        return dict(self._starts)

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where the next batch begins in each partition."""
        return dict(self._positions)

    def committed(self) -> dict[TopicAndPartition, int]:
        """Return the group's offsets, for the partitions that it has one for."""
        if not self._settings.get("group.id"):
            return {}
        with self._asking():
            return self._committed(list(self._positions))

    def close(self) -> None:
        """Let go of the connections to Kafka."""
        with self._lock:
            self._consumer.close(self._jvm.java.time.Duration.ofSeconds(1))

    def _look(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions end now, and find out where the new ones among them begin."""
        partitions = sorted(self._fixed_partitions) or self._partitions()
        new = [partition for partition in partitions if partition not in self._positions]
        if new:
            starts = self._find_starts(new)
            self._positions.update(starts)
            self._starts = {**self._starts, **starts}
        begins = self._offsets(self._consumer.beginningOffsets, partitions)
        ends = self._offsets(self._consumer.endOffsets, partitions)
        for partition, end in ends.items():
            self._stay_within(partition, begins[partition], end)
        self._unread = sum(end - self._positions[partition] for partition, end in ends.items())
        self._ends = ends
        return ends

    def _stay_within(self, partition: TopicAndPartition, begin: int, end: int) -> None:
        """Follow ``auto.offset.reset`` where the next record to be read was deleted."""
        position = self._positions[partition]
        if position > end:
            raise StreamError(
                f"{partition.topic}, partition {partition.partition}, is to be read from offset "
                f"{position}, but ends at {end}: the topic was made anew. Begin with a new "
                "group.id, or say where with fromOffsets."
            )
        if position < begin:
            reset = self._settings["auto.offset.reset"]
            self._positions[partition] = end if reset == "latest" else begin
            self._tell_of_loss(partition, position, self._positions[partition])

    def _tell_of_loss(self, partition: TopicAndPartition, first: int, after: int) -> None:
        """Warn of offsets that were deleted before they were read; raise if that was asked for."""
        what = (
            f"{after - first} events of {partition.topic}, partition {partition.partition} "
            f"(offsets {first} to {after - 1})"
        )
        if self._settings["auto.offset.reset"] == "none":
            raise StreamError(
                f"{what} are lost: the topic's retention has deleted records before they were "
                "read. Raise its retention.ms; to go on after the loss, set auto.offset.reset to "
                "earliest."
            )
        _LOGGER.warning(
            "%s are lost: the topic's retention has deleted records before they were read.", what
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
        committed = self._committed(partitions) if self._asks_group else {}
        never_read = [partition for partition in partitions if partition not in committed]
        if not never_read:
            return committed
        if self._settings["auto.offset.reset"] == "none" and not self._positions:
            raise StreamError(
                f"auto.offset.reset is none, and group {self._settings.get('group.id')!r} has "
                f"committed no offset of {never_read[0].topic}, partition "
                f"{never_read[0].partition}: set it to earliest or latest, or say where to begin "
                "with fromOffsets."
            )
        # A partition that appears while the stream runs is read from its beginning: what was
        # written to it before it was noticed must not be lost.
        earliest = self._positions or self._settings["auto.offset.reset"] == "earliest"
        ask = self._consumer.beginningOffsets if earliest else self._consumer.endOffsets
        reset = self._offsets(ask, never_read)
        # Where a group begins is committed at once. Otherwise a stream that stops before a
        # partition had records would begin at its end anew, past what came in between.
        if self._settings.get("enable.auto.commit") != "false":
            self.commit(reset)
        return {**committed, **reset}

    def _committed(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the group's offsets, for those of the partitions that it has one for."""
        found = self._offsets(self._consumer.committed, partitions)
        return {partition: offset.offset() for partition, offset in found.items() if offset}

    def _check_group(self) -> None:
        """Raise `StreamError` if consumers have joined the group: Kafka would refuse to commit."""
        group = self._settings.get("group.id")
        if not group:
            return
        admin = self._jvm.org.apache.kafka.clients.admin.Admin.create(
            java_map(self._spark, self._settings)
        )
        try:
            groups = admin.describeConsumerGroups(self._jvm.java.util.List.of(group))
            seconds = self._jvm.java.util.concurrent.TimeUnit.SECONDS
            answer = groups.describedGroups().get(group).get(ANSWER_SECONDS, seconds)
            members = [member.clientId() for member in answer.members()]
        except Py4JJavaError as error:
            if root_cause(error).getClass().getSimpleName() == "GroupIdNotFoundException":
                return
            raise
        finally:
            admin.close(self._jvm.java.time.Duration.ofSeconds(1))
        if members:
            raise StreamError(
                f"group {group!r} has live members ({', '.join(sorted(members))}), so Kafka would "
                "refuse the stream's commits, for a stream assigns its partitions and does not "
                "join the group: stop them, or use another group.id."
            )

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
            raise explained(error, self._settings) from None
