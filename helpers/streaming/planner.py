"""Which offsets belong to a batch: planned by what Kafka says, apart from any stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pyspark.sql import SparkSession

from helpers.streaming.client import KafkaClient
from helpers.streaming.errors import StreamError, TopicRecreatedError
from helpers.streaming.offsets import OffsetRange, TopicAndPartition
from helpers.streaming.settings import topic_names

# From how many offsets of each partition are left to how many of them the next batch may take.
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
        ``latest``, ``none``) says where the partitions of a topic start for which the group has no
        offset, and those whose records were deleted before they were read.
    from_offsets : mapping of TopicAndPartition to int, optional
        The partitions to read, and at which offset each starts.
    positions : mapping of TopicAndPartition to int, optional
        Where to resume: where an earlier planner of the same stream stopped, by `positions`, or
        what a sink has. The group's offsets are not used then, even if `positions` is empty.
    topic_ids : mapping of str to str, optional
        The ids of the topics that `positions` are of.

    Raises
    ------
    StreamError
        If a topic doesn't exist or was created again since, Kafka can't be reached, or refuses, or
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
        self._partitions: list[TopicAndPartition] = []  # that the topics have
        self._client = KafkaClient(spark, settings)
        self._settings = self._client.settings
        try:
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
            Takes how many offsets of each partition are left, and returns how many of them the
            batch may have.

        Returns
        -------
        list of OffsetRange
            Only ranges with records in them, sorted; none if nothing new has come.

        Raises
        ------
        StreamError
            If Kafka refuses, a topic was created again, or offsets were deleted and
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
                left[partition] = count - (until - start)
        self._unread = sum(left.values())
        return sorted(ranges)

    def without_deleted(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return planned ranges without what was deleted since; see `KafkaClient`."""
        return self._client.without_deleted(ranges)

    def commit(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Commit to the consumer group where each partition is to be read from next.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            The next offset of each partition. Without a ``group.id`` nothing happens.

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
        return self._unread

    def starts(self) -> dict[TopicAndPartition, int]:
        """Return where the first batch began in each partition that is read.

        Nothing of the partitions whose reading goes on at the `positions` of an earlier planner.
        """
        return dict(self._starts)

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where the next batch begins in each partition that the topics have."""
        return {partition: self._positions[partition] for partition in self._partitions}

    def topic_ids(self) -> dict[str, str]:
        """Return the ids of the topics that the positions are of, by the topics' names."""
        return dict(self._topic_ids)

    def topic_ids_now(self) -> dict[str, str]:
        """Ask Kafka for the topics' ids, which differ from `topic_ids` if one was created again."""
        return self._client.topic_ids(self._topics)

    def committed(self) -> dict[TopicAndPartition, int]:
        """Return the group's offsets of these topics, for the partitions that it has one for."""
        return {
            partition: committed.offset
            for partition, committed in self._client.committed(self._partitions).items()
            if committed.topic_id in (None, self._topic_ids[partition.topic])
        }

    def close(self) -> None:
        """Close the connections to Kafka."""
        self._client.close()

    def _look(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions end now, and find out where the new ones among them begin."""
        topics = self._client.topics(self._topics, self._topic_ids)
        self._topic_ids = {name: topic.topic_id for name, topic in topics.items()}
        partitions = sorted(self._fixed_partitions) or [
            partition for topic in topics.values() for partition in topic.partitions
        ]
        self._partitions = partitions
        new = [partition for partition in partitions if partition not in self._positions]
        if new:
            starts = self._find_starts(new)
            self._positions.update(starts)
            self._starts = {**self._starts, **starts}
        begins, ends = self._client.begins(partitions), self._client.ends(partitions)
        # A topic that is created again between the two questions has other offsets. The same id
        # before and after them proves them: Kafka never gives an id twice. The second question
        # alone would do for that, but offsets of a deleted topic are asked for in vain for 15 s,
        # as if the broker were away, and new partitions must be known first.
        self._client.topic_ids(self._topics, self._topic_ids)
        for partition, end in ends.items():
            self._stay_within(partition, begins[partition], end)
        self._unread = sum(end - self._positions[partition] for partition, end in ends.items())
        return ends

    def _stay_within(self, partition: TopicAndPartition, begin: int, end: int) -> None:
        """Follow ``auto.offset.reset`` where the next record to be read was deleted."""
        position = self._positions[partition]
        if position > end:
            raise TopicRecreatedError(
                partition.topic,
                f"partition {partition.partition} is to be read from offset {position}, but ends "
                f"at {end}",
            )
        if position < begin:
            reset = self._settings["auto.offset.reset"]
            self._positions[partition] = end if reset == "latest" else begin
            self._client.report_deleted(partition, position, self._positions[partition])

    def _find_starts(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return where partitions begin that the stream hasn't read from yet."""
        committed = self._committed(partitions) if self._uses_group else {}
        never_read = [partition for partition in partitions if partition not in committed]
        if not never_read:
            return committed
        # Of a topic that was read before, a partition without an offset was added since, and is
        # read from its beginning: what was written to it before it was noticed must not be lost.
        known = {partition.topic for partition in committed}
        added = [part for part in never_read if self._positions or part.topic in known]
        begun = [partition for partition in never_read if partition not in added]
        if begun and self._settings["auto.offset.reset"] == "none":
            raise StreamError(
                f"auto.offset.reset is none, and group {self._settings.get('group.id')!r} has "
                f"committed no offset of {begun[0].topic}, partition {begun[0].partition}: set it "
                "to earliest or latest, or say where to begin with fromOffsets."
            )
        at_end = begun if self._settings["auto.offset.reset"] == "latest" else []
        at_beginning = [partition for partition in never_read if partition not in at_end]
        starts = {**self._client.begins(at_beginning), **self._client.ends(at_end)}
        # Where a group begins is committed at once. Otherwise a stream that stops before a
        # partition had records would begin at its new end, past what came in between.
        if self._settings.get("enable.auto.commit") != "false":
            self.commit(starts)
        return {**committed, **starts}

    def _committed(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the group's offsets; raise if they are of another topic with the same name."""
        found = self._client.committed(partitions)
        for partition, committed in found.items():
            if committed.topic_id not in (None, self._topic_ids[partition.topic]):
                raise TopicRecreatedError(partition.topic)
        return {partition: committed.offset for partition, committed in found.items()}

    def _check_group(self) -> None:
        """Raise `StreamError` if consumers have joined the group: Kafka would refuse to commit."""
        members = self._client.members()
        if members:
            raise StreamError(
                f"group {self._settings['group.id']!r} has live members ({', '.join(members)}), so "
                "Kafka would refuse the stream's commits: a stream assigns its partitions and does "
                "not join the group. Stop them, or use another group.id."
            )
