"""The functions of `pyspark.streaming.kafka`, with their names and signatures."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyspark import SparkContext, StorageLevel
from pyspark.sql import DataFrame, Row
from pyspark.streaming import StreamingContext

from helpers.spark import get_spark
from helpers.streaming.batches import Batches
from helpers.streaming.client import KafkaClient, check_partitions
from helpers.streaming.dstream import KafkaDirectStream, KafkaRDD
from helpers.streaming.errors import BrokerAwayError, StreamError
from helpers.streaming.offsets import Broker, OffsetRange, TopicAndPartition
from helpers.streaming.reader import ELEMENT_COLUMNS, RangeReader
from helpers.streaming.recovery import StreamDefinition
from helpers.streaming.settings import (
    ZOOKEEPER_PORT,
    as_text,
    modern_settings,
    topic_names,
    without_group,
)

Decoder = Callable[[bytes | None], Any]

_NO_ZOOKEEPER = (
    "Kafka 4 has no ZooKeeper: pass the brokers' addresses instead, such as '127.0.0.1:9092'."
)


@dataclass(frozen=True)
class KafkaMessageAndMetadata:
    """What a `messageHandler` gets: a record, and where it came from.

    Attributes
    ----------
    topic : str
    partition : int
    offset : int
    key, message : object
        The results of the stream's `keyDecoder` and `valueDecoder`.
    """

    topic: str
    partition: int
    offset: int
    key: Any
    message: Any


def utf8_decoder(content: bytes | None) -> str | None:
    """Return bytes as text; None (no key or no value) stays None.

    Examples
    --------
    >>> utf8_decoder(b"Higgs")
    'Higgs'
    """
    return None if content is None else content.decode("utf-8")


class KafkaUtils:
    """The functions of `pyspark.streaming.kafka`, as in Spark 2.4."""

    @staticmethod
    def createStream(  # noqa: N802 (the API's name)
        ssc: StreamingContext,
        zkQuorum: str,  # noqa: N803
        groupId: str,  # noqa: N803
        topics: Mapping[str, int],
        kafkaParams: Mapping[str, str] | None = None,  # noqa: N803
        storageLevel: StorageLevel = StorageLevel.MEMORY_AND_DISK_2,  # noqa: N803
        keyDecoder: Decoder = utf8_decoder,  # noqa: N803
        valueDecoder: Decoder = utf8_decoder,  # noqa: N803
    ) -> KafkaDirectStream:
        """Return a DStream of the records of some topics, read for a consumer group.

        In Spark 2, this stream had a receiver, which stored records in Spark's memory before they
        were processed, and could lose them. It is now a direct stream with the old signature.

        **It begins at the end.** As before, a new group gets only records that arrive from now on:
        ``auto.offset.reset`` is ``largest`` unless `kafkaParams` sets it to ``smallest``.

        **Streams of one group get each record once**, as receivers did: this stream takes over the
        topics of earlier streams of the same context and group. (Spark reads a topic's partitions
        in parallel anyway, so a `union` of several streams, once a way to have several receivers,
        is no faster than one.)

        Parameters
        ----------
        ssc : pyspark.streaming.StreamingContext
            The context that the stream is part of.
        zkQuorum : str or list of str
            The brokers' addresses: ``host:port``, separated by commas. They replace ZooKeeper's,
            which Kafka 4 doesn't have.
        groupId : str
            The consumer group, to which offsets are committed.
        topics : dict of str to int
            The topics to read. The numbers, once of a receiver's threads, have no effect.
        kafkaParams : dict, optional
            More settings of `KafkaConsumer` by Kafka's names.
        storageLevel : pyspark.StorageLevel
            Has no effect, because nothing is stored.
        keyDecoder, valueDecoder : callable
            Turn the bytes of a key and a value (None if missing) into Python objects.

        Returns
        -------
        KafkaDirectStream
            A DStream of ``(key, value)``.

        Raises
        ------
        StreamError
            If a topic doesn't exist, or Kafka can't be reached or refuses access.
        TypeError
            If `topics` is not a dict.
        ValueError
            If `zkQuorum` is ZooKeeper's address.

        Examples
        --------
        >>> brokers = kafka.bootstrap_servers
        >>> stream = KafkaUtils.createStream(ssc, brokers, "counting", {"events": 1})
        >>> stream.count().pprint()
        """
        if not isinstance(topics, Mapping):
            raise TypeError("topics must be a dict from topics to numbers, such as {'events': 1}.")
        brokers = as_text(zkQuorum)
        _refuse_zookeeper(brokers)
        settings = modern_settings(
            {**(kafkaParams or {}), "bootstrap.servers": brokers, "group.id": groupId}
        )
        to_element = _element_maker(keyDecoder, valueDecoder, None)
        try:
            return _stream(ssc, to_element, topic_names(topics), settings, shares=True)
        except BrokerAwayError as error:
            raise BrokerAwayError(
                f"{error} It may be ZooKeeper's address. {_NO_ZOOKEEPER}"
            ) from None

    @staticmethod
    def createDirectStream(  # noqa: N802
        ssc: StreamingContext,
        topics: list[str],
        kafkaParams: Mapping[str, str],  # noqa: N803
        fromOffsets: Mapping[TopicAndPartition, int] | None = None,  # noqa: N803
        keyDecoder: Decoder = utf8_decoder,  # noqa: N803
        valueDecoder: Decoder = utf8_decoder,  # noqa: N803
        messageHandler: Callable[[KafkaMessageAndMetadata], Any] | None = None,  # noqa: N803
        positions: Mapping[TopicAndPartition, int] | None = None,
    ) -> KafkaDirectStream:
        """Return a DStream of the records of some topics, without a receiver.

        Parameters
        ----------
        ssc : pyspark.streaming.StreamingContext
            The context that the stream is part of.
        topics : list of str, or str
            The topics to read, or the only one.
        kafkaParams : dict
            Settings of `KafkaConsumer` by Kafka's names, security included: ``bootstrap.servers``
            (required), ``group.id`` (without it nothing is committed), ``auto.offset.reset``
            (``latest`` by default), ``enable.auto.commit`` (if false, only
            `KafkaDirectStream.commitAsync` commits). The names and values of Kafka 0.8
            (``metadata.broker.list``, ``smallest``, ``largest``) and a list of brokers also work.
        fromOffsets : dict of TopicAndPartition to int, optional
            The partitions to read, and where each starts; by default all partitions, from the
            group's offsets.
        keyDecoder, valueDecoder : callable
            Turn the bytes of a key and a value (None if missing) into Python objects.
        messageHandler : callable, optional
            Turns a `KafkaMessageAndMetadata` into the stream's element, instead of ``(key,
            value)``.
        positions : dict of TopicAndPartition to int, optional
            Where to resume, as returned by `ParquetSink.positions`, instead of the group's offsets.
            Unlike `fromOffsets`, it may leave out partitions, which are read from their beginning,
            and whole topics, for which ``auto.offset.reset`` says where to begin.

        Returns
        -------
        KafkaDirectStream
            A DStream of ``(key, value)``, or of what the message handler returns.

        Raises
        ------
        StreamError
            If a topic doesn't exist, Kafka can't be reached or refuses access, or the group has
            members.
        ValueError
            If ``bootstrap.servers`` is missing or has no port, ``auto.offset.reset`` is invalid,
            Kafka doesn't know a setting, `fromOffsets` names other topics or negative offsets, or
            ``spark.streaming.concurrentJobs`` is above 1.

        Notes
        -----
        Streams of one context must not read the same partitions for the same group: each would
        commit offsets that the other has not processed, so the context stops with that reason.

        The settings of the Spark session limit the size of batches; see `RateLimit`.

        Examples
        --------
        >>> stream = KafkaUtils.createDirectStream(
        ...     ssc, ["events"], {"bootstrap.servers": kafka.bootstrap_servers})
        >>> stream.map(lambda record: record[1]).pprint()
        """
        names, settings = topic_names(topics), modern_settings(kafkaParams)
        _check_from_offsets(names, fromOffsets)
        to_element = _element_maker(keyDecoder, valueDecoder, messageHandler)
        return _stream(ssc, to_element, names, settings, fromOffsets, positions)

    @staticmethod
    def createRDD(  # noqa: N802
        sc: SparkContext,
        kafkaParams: Mapping[str, str],  # noqa: N803
        offsetRanges: list[OffsetRange],  # noqa: N803
        leaders: Mapping[TopicAndPartition, Broker] | None = None,
        keyDecoder: Decoder = utf8_decoder,  # noqa: N803
        valueDecoder: Decoder = utf8_decoder,  # noqa: N803
        messageHandler: Callable[[KafkaMessageAndMetadata], Any] | None = None,  # noqa: N803
    ) -> KafkaRDD:
        """Return an RDD of the records of offset ranges, independently of any stream.

        Parameters
        ----------
        sc : pyspark.SparkContext
            The context whose executors read.
        kafkaParams : dict
            Settings of `KafkaConsumer` by Kafka's names, as for `createDirectStream`.
        offsetRanges : list of OffsetRange
            The ranges to read.
        leaders : dict of TopicAndPartition to Broker, optional
            Has no effect: today's Kafka clients find the leader of a partition themselves.
        keyDecoder, valueDecoder : callable
            Turn the bytes of a key and a value (None if missing) into Python objects.
        messageHandler : callable, optional
            Turns a `KafkaMessageAndMetadata` into the RDD's element, instead of ``(key, value)``.

        Returns
        -------
        KafkaRDD
            An RDD of ``(key, value)``, or of what the message handler returns.

        Raises
        ------
        StreamError
            If a partition doesn't have a range, or Kafka can't be reached or refuses access.

        Examples
        --------
        >>> ranges = [OffsetRange("events", 0, 0, 10)]
        >>> settings = {"bootstrap.servers": kafka.bootstrap_servers}
        >>> KafkaUtils.createRDD(spark.sparkContext, settings, ranges).count()
        10
        """
        spark, settings = get_spark(), modern_settings(kafkaParams)
        if not offsetRanges:
            return KafkaRDD(sc.emptyRDD(), [])
        _check_ranges(offsetRanges, settings)
        reader = RangeReader(spark, settings)
        parts = [reader.read(ranges) for ranges in _one_per_partition(offsetRanges)]
        records = functools.reduce(DataFrame.union, parts).select(*ELEMENT_COLUMNS)
        to_element = _element_maker(keyDecoder, valueDecoder, messageHandler)
        return KafkaRDD(records.rdd.map(to_element), offsetRanges)


def _stream(
    ssc: StreamingContext,
    to_element: Callable[[Row], Any],
    topics: list[str],
    settings: Mapping[str, str],
    from_offsets: Mapping[TopicAndPartition, int] | None = None,
    positions: Mapping[TopicAndPartition, int] | None = None,
    shares: bool = False,
) -> KafkaDirectStream:
    """Return the stream of a definition."""
    _check_one_at_a_time(ssc)
    interval = ssc._jssc.ssc().graph().batchDuration().milliseconds() / 1000
    batches = Batches(
        StreamDefinition(topics, settings, interval, from_offsets, positions, shares)
    )
    batches.connect(ssc)
    return KafkaDirectStream(ssc, batches, to_element)


def _refuse_zookeeper(addresses: str) -> None:
    """Raise `ValueError` for ZooKeeper's addresses, which end in a path or have the port 2181."""
    servers, path, _ = addresses.partition("/")
    if path or any(server.strip().endswith(f":{ZOOKEEPER_PORT}") for server in servers.split(",")):
        raise ValueError(f"{addresses!r} is ZooKeeper's address. {_NO_ZOOKEEPER}")


def _check_from_offsets(
    topics: list[str], from_offsets: Mapping[TopicAndPartition, int] | None
) -> None:
    """Raise `ValueError` if offsets are negative, or for topics other than a stream's."""
    given = {partition.topic for partition in from_offsets or ()}
    if given and given != set(topics):
        raise ValueError(
            f"fromOffsets has the topics {sorted(given)}, but topics is {sorted(set(topics))}: "
            "name the same topics in both."
        )
    for partition, offset in (from_offsets or {}).items():
        if offset < 0:
            raise ValueError(
                f"fromOffsets has the offset {offset} for {partition.topic}, partition "
                f"{partition.partition}: the first offset of a partition is 0."
            )


def _check_one_at_a_time(ssc: StreamingContext) -> None:
    """Raise `ValueError` if batches could overtake each other: offsets are committed in order."""
    name = "spark.streaming.concurrentJobs"
    number = ssc.sparkContext.getConf().get(name, "1")
    if int(number) > 1:
        raise ValueError(
            f"{name} is {number}, but a batch may only begin after the one before it: set it to 1 "
            "or leave it out, and create the Spark session again."
        )


def _element_maker(
    key_decoder: Decoder,
    value_decoder: Decoder,
    message_handler: Callable[[KafkaMessageAndMetadata], Any] | None,
) -> Callable[[Row], Any]:
    """Return the function from a row of Spark's Kafka source to an element of a stream."""

    def to_element(row: Row) -> Any:
        key = _applied(key_decoder, "keyDecoder", row, _content(row.key))
        value = _applied(value_decoder, "valueDecoder", row, _content(row.value))
        if message_handler is None:
            return key, value
        record = KafkaMessageAndMetadata(row.topic, row.partition, row.offset, key, value)
        return _applied(message_handler, "messageHandler", row, record)

    return to_element


def _content(content: bytearray | None) -> bytes | None:
    return None if content is None else bytes(content)


def _applied(function: Callable[[Any], Any], name: str, row: Row, given: Any) -> Any:
    """Return the result of a user's function, or raise an error that names the record."""
    try:
        return function(given)
    except Exception as error:
        raise ValueError(
            f"the record at {row.topic}, partition {row.partition}, offset {row.offset} can't be "
            f"processed by {name}: {type(error).__name__}: {error}. Give the stream a {name} that "
            "accepts it."
        ) from error


def _one_per_partition(ranges: list[OffsetRange]) -> list[list[OffsetRange]]:
    """Return ranges in lists in which each partition has one at most."""
    lists: list[dict[TopicAndPartition, OffsetRange]] = []
    for part in ranges:
        partition = part.topicAndPartition()
        if all(partition in taken for taken in lists):
            lists.append({})
        next(taken for taken in lists if partition not in taken)[partition] = part
    return [list(taken.values()) for taken in lists]


def _check_ranges(ranges: list[OffsetRange], settings: Mapping[str, str]) -> None:
    """Raise `StreamError` for a range that its partition doesn't have."""
    # Without a group, and with an error instead of a warning if records were deleted.
    client = KafkaClient(get_spark(), {**without_group(settings), "auto.offset.reset": "none"})
    with contextlib.closing(client):
        topics = client.topics({part.topic for part in ranges})  # raises if one is missing
        check_partitions((part.topicAndPartition() for part in ranges), topics)
        for apart in _one_per_partition(ranges):
            client.without_deleted(apart)
        ends = client.ends({part.topicAndPartition() for part in ranges})
    for part in ranges:
        end = ends[part.topicAndPartition()]
        last = max(part.fromOffset, part.untilOffset)
        if last > end:
            raise StreamError(
                f"{part.topic}, partition {part.partition}, ends at offset {end}, before {last}: "
                "give a range of existing records."
            )
