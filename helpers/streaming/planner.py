"""Decides which offsets belong to a batch, independently of any stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from pyspark.sql import SparkSession

from helpers.streaming.client import Committed, KafkaClient, check_partitions
from helpers.streaming.errors import StreamError, TopicRecreatedError
from helpers.streaming.offsets import OffsetRange, TopicAndPartition, is_another
from helpers.streaming.settings import topic_names

_LOGGER = logging.getLogger(__name__)

# Takes how many offsets of each partition are left; returns how many the next batch may have.
Limit = Callable[[Mapping[TopicAndPartition, int]], Mapping[TopicAndPartition, int]]


class OffsetPlanner:
    """Decides which offsets of some topics belong to the next batch.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    topics : iterable of str
        The topics; all their partitions are read, unless `from_offsets` names some. Partitions that
        are added later are read from their beginning.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. ``auto.offset.reset`` (``earliest``,
        ``latest``, ``none``) says where a partition starts if the group has no offset for its
        topic, or if its next records were deleted before they were read.
    from_offsets : mapping of TopicAndPartition to int, optional
        The partitions to read, and at which offset each starts.
    positions : mapping of TopicAndPartition to int, optional
        Where to resume: the `positions` of an earlier planner of the same stream, or of a sink. The
        group's offsets are then not used, even if `positions` is empty.
    topic_ids : mapping of str to str, optional
        The ids of the topics that `positions` belong to.

    Raises
    ------
    StreamError
        If a topic doesn't exist or was created again, Kafka can't be reached or refuses access, or
        the group has members.
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
        topic_ids: Mapping[str, str] | None = None,
    ) -> None:
        self._topics = sorted(set(topic_names(topics)))
        self._fixed_partitions = set(from_offsets or ())
        self._positions: dict[TopicAndPartition, int] = dict(positions or from_offsets or {})
        self._starts = {} if positions else dict(self._positions)
        self._uses_group = bool(settings.get("group.id")) and positions is None
        self._topic_ids: dict[str, str] = dict(topic_ids or {})
        self._partitions: list[TopicAndPartition] = []  # the partitions that are read
        # The offsets that the group had at first, or that this planner has sent to it; two or more
        # of a partition if an answer was lost.
        self._expected: dict[TopicAndPartition, set[int]] = {}
        self._client = KafkaClient(spark, settings)
        self._settings = self._client.settings
        try:
            self._check_group()
            self._look()
        except BaseException:
            self.close()
            raise

    def next_batch(self, limit: Limit | None = None) -> list[OffsetRange]:
        """Return the ranges from the end of the last batch to the current end of the topics.

        Parameters
        ----------
        limit : callable, optional
            Takes how many offsets of each partition are left, and returns how many of them the
            batch may have.

        Returns
        -------
        list of OffsetRange
            The ranges that are not empty, sorted; an empty list if there are no new records.

        Raises
        ------
        StreamError
            If Kafka refuses access, a topic was created again, or offsets were deleted and
            ``auto.offset.reset`` is ``none``.
        BrokerAwayError
            If Kafka gives no answer within 15 s.
        """
        left = {
            partition: end - self._positions[partition] for partition, end in self._look().items()
        }
        most = left if limit is None else limit(left)
        ranges = []
        for partition, count in left.items():
            topic, start = partition.topic, self._positions[partition]
            until = start + min(count, most[partition])
            if until > start:
                topic_id = self._topic_ids[topic]
                ranges.append(OffsetRange(topic, partition.partition, start, until, topic_id))
                self._positions[partition] = until
        return sorted(ranges)

    def without_deleted(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return planned ranges without offsets deleted since; see `KafkaClient`."""
        return self._client.without_deleted(ranges)

    def report_deleted_meanwhile(self, ranges: Iterable[OffsetRange]) -> None:
        """Warn about offsets that retention deleted while their batch was read."""
        self._client.report_deleted_meanwhile(ranges)

    def commit(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Commit the next offset of each partition to the consumer group.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            The offsets. Without a ``group.id``, nothing is committed.

        Raises
        ------
        TopicRecreatedError
            If a topic was created again since the offsets were planned.
        StreamError
            If another program has committed other offsets since the planner began. (One that
            commits between this look and the commit is not seen.)
        """
        if self._settings.get("group.id") and offsets:
            self._check_commits(offsets)
            for partition, offset in offsets.items():
                self._expected[partition].add(offset)
            self.repeat(offsets)
            self._expected.update((partition, {offset}) for partition, offset in offsets.items())

    def repeat(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Commit offsets that the group has, or had until they expired, whoever committed them.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            The next offset of each partition.

        Raises
        ------
        TopicRecreatedError
            If a topic was created again since the offsets were planned.
        """
        if self._settings.get("group.id") and offsets:
            self._client.topic_ids(self._topics, self._topic_ids)
            self._client.commit(offsets, self._topic_ids)

    def unread(self) -> int:
        """Return how many offsets were left when the last batch was planned."""
        return sum(max(0, end - self._positions[part]) for part, end in self._ends.items())

    def ends(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions ended when the last batch was planned."""
        return dict(self._ends)

    def starts(self) -> dict[TopicAndPartition, int]:
        """Return where the first batch began in each partition that is read.

        Partitions that resume from the `positions` of an earlier planner are left out.
        """
        return dict(self._starts)

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where the next batch begins in each partition."""
        return {partition: self._positions[partition] for partition in self._partitions}

    def topic_ids(self) -> dict[str, str]:
        """Return the ids of the topics that the positions belong to, by name."""
        return dict(self._topic_ids)

    def topic_ids_now(self) -> dict[str, str]:
        """Ask Kafka for the topics' ids; raise if one of the topics was created again."""
        return self._client.topic_ids(self._topics, self._topic_ids)

    def committed(self) -> dict[TopicAndPartition, int]:
        """Return the group's committed offsets for these topics."""
        return {
            partition: committed.offset
            for partition, committed in self._in_group(self._partitions).items()
            if not is_another(committed.topic_id, self._topic_ids[partition.topic])
        }

    def close(self) -> None:
        """Close the connections to Kafka."""
        self._client.close()

    def _look(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions end now, and find where new ones begin."""
        topics = self._client.topics(self._topics, self._topic_ids)
        self._topic_ids = {name: topic.topic_id for name, topic in topics.items()}
        check_partitions(self._fixed_partitions, topics)
        partitions = sorted(self._fixed_partitions) or [
            partition for topic in topics.values() for partition in topic.partitions
        ]
        new = [partition for partition in partitions if partition not in self._positions]
        if new:
            starts = self._find_starts(new)
            self._positions.update(starts)
            self._starts = {**self._starts, **starts}
        self._partitions = partitions  # not before, because each of them must have a position
        begins, ends = self._client.begins(partitions), self._client.ends(partitions)
        # A topic may be created again between these requests. If its id is the same before and
        # after them, the offsets are valid, because Kafka never reuses an id. A check afterwards
        # alone would not do: new partitions must be known first, and a request for a deleted
        # topic's offsets times out after 15 s, as if the broker were away.
        self._client.topic_ids(self._topics, self._topic_ids)
        for partition, end in ends.items():
            self._stay_within(partition, begins[partition], end)
            # Where only the records of finished transactions count, an end may be behind.
            ends[partition] = max(end, self._positions[partition])
        self._ends = ends
        return ends

    def _stay_within(self, partition: TopicAndPartition, begin: int, end: int) -> None:
        """Apply ``auto.offset.reset`` if a partition's next record was deleted."""
        position = self._positions[partition]
        if position > end and position > self._client.last_written(partition):
            raise TopicRecreatedError(
                partition.topic,
                f"partition {partition.partition} should resume from offset {position}, but ends "
                f"at {end}; it looks the same after a power cut in which Kafka lost records",
            )
        if position < begin:
            reset = self._settings["auto.offset.reset"]
            self._positions[partition] = end if reset == "latest" else begin
            self._client.report_deleted(partition, position, begin, self._positions[partition])

    def _find_starts(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return where partitions begin that the stream has not read yet."""
        committed = self._committed(partitions) if self._uses_group else {}
        never_read = [partition for partition in partitions if partition not in committed]
        if not never_read:
            return committed
        # If a topic was read before, a partition without an offset was added since. It is read from
        # its beginning, because records written before it was noticed must not be lost.
        known = {partition.topic for partition in (*committed, *self._positions)}
        added = [part for part in never_read if part.topic in known]
        begun = [partition for partition in never_read if partition not in added]
        if begun and self._settings["auto.offset.reset"] == "none":
            raise StreamError(
                f"auto.offset.reset is none, and group {self._settings.get('group.id')!r} has no "
                f"committed offset for {begun[0].topic}, partition {begun[0].partition}: set it to "
                "earliest or latest, or pass fromOffsets."
            )
        at_end = begun if self._settings["auto.offset.reset"] == "latest" else []
        at_beginning = [partition for partition in never_read if partition not in at_end]
        starts = {**self._client.begins(at_beginning), **self._client.ends(at_end)}
        if added:
            _LOGGER.warning(
                "partitions without a committed offset are read from their beginning, because "
                "others of their topic were read before: %s",
                ", ".join(f"{part.topic}-{part.partition} from {starts[part]}" for part in added),
            )
        # A group's first offsets are committed at once. Otherwise, a stream that stops before a
        # partition has records would later begin at its new end, and skip the records in between.
        if self._settings.get("enable.auto.commit") != "false":
            self.commit(starts)
        return {**committed, **starts}

    def _committed(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the group's offsets; raise if they belong to an earlier topic of the same name."""
        found = self._in_group(partitions)
        for partition, committed in found.items():
            if is_another(committed.topic_id, self._topic_ids[partition.topic]):
                raise TopicRecreatedError(partition.topic)
        return {partition: committed.offset for partition, committed in found.items()}

    def _in_group(
        self, partitions: Collection[TopicAndPartition]
    ) -> dict[TopicAndPartition, Committed]:
        """Return the group's committed offsets, and note those that it had at first.

        Those of a query are left out. They only show its lag: what it has read, this stream has
        not.
        """
        found = self._client.committed(partitions)
        for partition in partitions:
            at_first = {found[partition].offset} if partition in found else set()
            self._expected.setdefault(partition, at_first)
        return {part: committed for part, committed in found.items() if not committed.by_query}

    def _check_commits(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Raise `StreamError` if others have committed what these offsets would replace.

        Offsets that Kafka has expired may be committed again, and those of a query be replaced.
        """
        for partition, committed in self._in_group(offsets).items():
            expected = self._expected[partition] | {offsets[partition]}
            if committed.offset not in expected:
                raise StreamError(
                    f"another program has committed offset {committed.offset} of "
                    f"{partition.topic}, partition {partition.partition}, for group "
                    f"{self._settings['group.id']!r} while this stream was running. The stream "
                    "would replace it: give each program a separate group.id, and start only one "
                    "instance of each."
                )

    def _check_group(self) -> None:
        """Raise `StreamError` if the group has members, because Kafka would refuse the commits."""
        members = self._client.members()
        if members:
            raise StreamError(
                f"group {self._settings['group.id']!r} has live members ({', '.join(members)}), so "
                "Kafka would refuse the stream's commits: a stream assigns its partitions and does "
                "not join the group. Stop them, or use another group.id."
            )
