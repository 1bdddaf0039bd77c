"""The functions of `pyspark.streaming.kafka`, with their names and signatures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyspark import SparkContext, StorageLevel
from pyspark.sql import Row
from pyspark.streaming import StreamingContext

from helpers.spark import get_spark
from helpers.streaming.batches import Batches
from helpers.streaming.client import KafkaClient
from helpers.streaming.dstream import KafkaDirectStream, KafkaRDD
from helpers.streaming.errors import BrokerAwayError, StreamError
from helpers.streaming.offsets import Broker, OffsetRange, TopicAndPartition
from helpers.streaming.reader import RangeReader
from helpers.streaming.recovery import StreamDefinition
from helpers.streaming.settings import NO_ZOOKEEPER, modern_settings, refuse_zookeeper

Decoder = Callable[[bytes | None], Any]


@dataclass(frozen=True)
class KafkaMessageAndMetadata:
    """What a `messageHandler` is given: a record with where it came from.

    Attributes
    ----------
    topic : str
    partition : int
    offset : int
    key, message : object
        What the stream's `keyDecoder` and `valueDecoder` made of the record's bytes.
    """

    topic: str
    partition: int
    offset: int
    key: Any
    message: Any


def utf8_decoder(content: bytes | None) -> str | None:
    """Return bytes as text; None (a record without key or value) stays None.

    Examples
    --------
    >>> utf8_decoder(b"Higgs")
    'Higgs'
    """
    return None if content is None else content.decode("utf-8")


class KafkaUtils:
    """How `pyspark.streaming.kafka` offered Kafka's records, until Spark 2.4."""

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

        It was the stream with a receiver. Receivers stored records in Spark's memory before they
        were processed, and could lose them; this one is a direct stream under the old signature.

        **It begins at the end.** As ever, a group that is new gets only what arrives from now on:
        ``auto.offset.reset`` is ``largest`` unless `kafkaParams` says ``smallest``.

        Parameters
        ----------
        ssc : pyspark.streaming.StreamingContext
            The context that the stream is part of.
        zkQuorum : str
            The brokers' addresses, ``host:port`` with commas between. It once was ZooKeeper's,
            which Kafka 4 doesn't have.
        groupId : str
            The consumer group, which keeps how far the stream has come.
        topics : dict of str to int
            The topics to read. The numbers, once of a receiver's threads, are of no effect: each
            partition of a topic is read by a Spark task.
        kafkaParams : dict, optional
            More settings of `KafkaConsumer` by Kafka's names.
        storageLevel : pyspark.StorageLevel
            Of no effect, as nothing is stored.
        keyDecoder, valueDecoder : callable
            From the bytes of a key and a value (None if there are none) to Python objects.

        Returns
        -------
        KafkaDirectStream
            A DStream of ``(key, value)``.

        Raises
        ------
        StreamError
            If a topic doesn't exist, or Kafka can't be reached, or refuses.
        TypeError
            If `topics` is no dict.
        ValueError
            If `zkQuorum` is ZooKeeper's address.

        Examples
        --------
        >>> brokers = kafka.bootstrap_servers
        >>> stream = KafkaUtils.createStream(ssc, brokers, "counting", {"events": 1})
        >>> stream.count().pprint()
        """
        if not isinstance(topics, Mapping):
            raise TypeError("topics must be a dict from each topic to a number, as {'events': 1}.")
        refuse_zookeeper(zkQuorum)
        settings = {**(kafkaParams or {}), "bootstrap.servers": zkQuorum, "group.id": groupId}
        try:
            return KafkaUtils.createDirectStream(
                ssc, list(topics), settings, keyDecoder=keyDecoder, valueDecoder=valueDecoder
            )
        except BrokerAwayError as error:
            raise BrokerAwayError(
                f"{error} It may be ZooKeeper's address. {NO_ZOOKEEPER}"
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
        topics : list of str
            The topics to read.
        kafkaParams : dict
            Settings of `KafkaConsumer` by Kafka's names, security included:
            ``bootstrap.servers`` (required), ``group.id`` (without it nothing is committed),
            ``auto.offset.reset`` (``latest`` by default), ``enable.auto.commit`` (false: only what
            `KafkaDirectStream.commitAsync` is given). The names and values of Kafka 0.8
            (``metadata.broker.list``, ``smallest``, ``largest``) work too.
        fromOffsets : dict of TopicAndPartition to int, optional
            The partitions to read, and where each starts; by default all partitions, from where
            the group is.
        keyDecoder, valueDecoder : callable
            From the bytes of a key and a value (None if there are none) to Python objects.
        messageHandler : callable, optional
            From a `KafkaMessageAndMetadata` to the stream's element, instead of ``(key, value)``.
        positions : dict of TopicAndPartition to int, optional
            Where to go on, as a sink says (`ParquetSink.positions`), instead of where the group is.
            Unlike `fromOffsets` it may leave partitions out: these are read from their beginning;
            where it is empty, from where ``auto.offset.reset`` says.

        Returns
        -------
        KafkaDirectStream
            A DStream of ``(key, value)``, or of what the message handler returns.

        Raises
        ------
        StreamError
            If a topic doesn't exist, Kafka can't be reached or refuses, or the group has members.
        ValueError
            If ``bootstrap.servers`` is missing or has no port, ``auto.offset.reset`` is no such
            thing, Kafka doesn't know a setting, or ``spark.streaming.concurrentJobs`` is above 1.

        Notes
        -----
        How much goes into a batch is for the settings of the Spark session, see `RateLimit`.

        Examples
        --------
        >>> stream = KafkaUtils.createDirectStream(
        ...     ssc, ["events"], {"bootstrap.servers": kafka.bootstrap_servers})
        >>> stream.map(lambda record: record[1]).pprint()
        """
        _check_one_at_a_time(ssc)
        interval = ssc._jssc.ssc().graph().batchDuration().milliseconds() / 1000
        settings = modern_settings(kafkaParams)
        definition = StreamDefinition(list(topics), settings, interval, fromOffsets, positions)
        batches = Batches(definition)
        batches.connect(ssc)
        to_element = _element_maker(keyDecoder, valueDecoder, messageHandler)
        return KafkaDirectStream(ssc, batches, to_element)

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
        """Return an RDD of the records of offset ranges, once, apart from any stream.

        Parameters
        ----------
        sc : pyspark.SparkContext
            The context whose executors read.
        kafkaParams : dict
            Settings of `KafkaConsumer` by Kafka's names, as for `createDirectStream`.
        offsetRanges : list of OffsetRange
            What to read.
        leaders : dict of TopicAndPartition to Broker, optional
            Of no effect: today's Kafka clients find out themselves which broker leads a partition.
        keyDecoder, valueDecoder : callable
            From the bytes of a key and a value (None if there are none) to Python objects.
        messageHandler : callable, optional
            From a `KafkaMessageAndMetadata` to the RDD's element, instead of ``(key, value)``.

        Returns
        -------
        KafkaRDD
            An RDD of ``(key, value)``, or of what the message handler returns.

        Raises
        ------
        StreamError
            If a partition doesn't hold a range, or Kafka can't be reached, or refuses.

        Examples
        --------
        >>> ranges = [OffsetRange("events", 0, 0, 10)]
        >>> settings = {"bootstrap.servers": kafka.bootstrap_servers}
        >>> KafkaUtils.createRDD(spark.sparkContext, settings, ranges).count()
        10
        """
        spark, settings = get_spark(), modern_settings(kafkaParams)
        _check_ranges(offsetRanges, settings)
        if not offsetRanges:
            return KafkaRDD(sc.emptyRDD(), [])
        records = RangeReader(spark, settings).read(offsetRanges).rdd
        to_element = _element_maker(keyDecoder, valueDecoder, messageHandler)
        return KafkaRDD(records.map(to_element), offsetRanges)


def _check_one_at_a_time(ssc: StreamingContext) -> None:
    """Raise `ValueError` if batches can overtake each other: offsets are committed in order."""
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
        key = key_decoder(None if row.key is None else bytes(row.key))
        value = value_decoder(None if row.value is None else bytes(row.value))
        if message_handler is None:
            return key, value
        return message_handler(
            KafkaMessageAndMetadata(row.topic, row.partition, row.offset, key, value)
        )

    return to_element


def _check_ranges(ranges: list[OffsetRange], settings: Mapping[str, str]) -> None:
    """Raise `StreamError` for a range that its partition doesn't hold."""
    if not ranges:
        return
    # Without a group, and with an error instead of a warning where records were deleted.
    asked = {name: value for name, value in settings.items() if name != "group.id"}
    client = KafkaClient(get_spark(), {**asked, "auto.offset.reset": "none"})
    with contextlib.closing(client):
        client.topics({part.topic for part in ranges})  # they exist
        client.without_deleted(ranges)
        ends = client.ends({part.topicAndPartition() for part in ranges})
    for part in ranges:
        end = ends[part.topicAndPartition()]
        if part.fromOffset > end:
            raise StreamError(
                f"{part.topic}, partition {part.partition}, is to be read from offset "
                f"{part.fromOffset}, but ends at {end}: give a range of records that exist."
            )
        if part.untilOffset > end:
            raise StreamError(
                f"{part.topic}, partition {part.partition}, ends at offset {end}, so there is "
                f"nothing yet up to {part.untilOffset}: give a range that ends there."
            )
