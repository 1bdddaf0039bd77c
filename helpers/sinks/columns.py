"""The columns of a sink's files: their types, and how they are computed from scored records.

Expressions are cached per context, because their hundreds of calls to Java would take 20 ms in each
batch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping

from pyspark import SparkContext
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import (
    BinaryType,
    DoubleType,
    IntegerType,
    LongType,
    MapType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from helpers.records import MODEL_VERSION, named, vector_entries
from helpers.streaming import OffsetRange, TopicAndPartition

# The columns of the files after the event's id. `bad` holds a bad record and the reason. No DDL
# string, because there a session's settings decide which type `timestamp` is.
_BAD = StructType().add("key", BinaryType()).add("value", BinaryType()).add("reason", StringType())
_STORED = {
    "probability_0": DoubleType(),
    "probability_1": DoubleType(),
    "predicted_index": IntegerType(),
    MODEL_VERSION: StringType(),
    "topic": StringType(),
    "partition": IntegerType(),
    "offset": LongType(),
    "event_time": TimestampType(),
    "batch": LongType(),
    "bad": _BAD,
}

# A batch's offset ranges by "topic/partition": the first offset, the first one not yet stored, and
# the end; and the batch's number.
_BOUNDS = MapType(
    StringType(),
    StructType([StructField(name, LongType()) for name in ("first", "left", "end", "batch")]),
)


def stored_schema(event_id: str) -> StructType:
    """Return the schema of a sink's files.

    Examples
    --------
    >>> stored_schema("EventId").names[:3]
    ['EventId', 'probability_0', 'probability_1']
    """
    columns = {event_id: LongType(), **_STORED}
    return StructType([StructField(*column) for column in columns.items()])


def bounded(
    scored: DataFrame,
    ranges: Iterable[OffsetRange],
    starts: Mapping[TopicAndPartition, int],
    batch: int,
) -> DataFrame:
    """Return the records of a batch that are not stored yet, with the column ``bounds``.

    Parameters
    ----------
    scored : pyspark.sql.DataFrame
        The batch's records, with their ``topic``, ``partition`` and ``offset``.
    ranges : iterable of OffsetRange
        The batch's ranges.
    starts : mapping of TopicAndPartition to int
        The first offset that is not stored yet, by partition; completely stored partitions are left
        out.
    batch : int
        The batch's number in the sink.
    """
    bounds = {
        f"{part.topic}/{part.partition}": {
            "first": part.fromOffset,
            "left": starts.get(part.topicAndPartition(), part.untilOffset),
            "end": part.untilOffset,
            "batch": batch,
        }
        for part in ranges
    }
    # A map, because numbers would become part of the code that Spark generates, which Java would
    # have to compile for each batch.
    known = F.from_json(F.lit(json.dumps(bounds)), _BOUNDS)
    key = F.concat_ws("/", "topic", "partition")
    records = scored.withColumn("bounds", F.try_element_at(known, key))
    if all(bound["left"] == bound["first"] for bound in bounds.values()):
        return records
    is_left = F.col("offset") >= F.col("bounds.left")
    return records.where(F.col("bounds").isNull() | is_left)


@functools.lru_cache(maxsize=8)
def stored_columns(context: SparkContext, event_id: str, has_version: bool) -> list[Column]:
    """Return the columns of a sink's files, from the columns of `bounded` records.

    Parameters
    ----------
    context : pyspark.SparkContext
        The context of the session that uses them.
    event_id : str
        The column that identifies an event.
    has_version : bool
        Whether the records have the version of the model that scored them.
    """
    prediction = vector_entries(F.col("prediction"))
    version = F.col(MODEL_VERSION) if has_version else F.lit(None)
    return [
        named(event_id),
        prediction[0].alias("probability_0"),
        prediction[1].alias("probability_1"),
        F.col("predicted_index").cast("int"),
        version.cast("string").alias(MODEL_VERSION),
        *map(F.col, ("topic", "partition", "offset")),
        F.col("timestamp").alias("event_time"),
        F.col("bounds.batch").alias("batch"),
        F.col("bad"),
    ]


@functools.lru_cache(maxsize=8)
def metrics(context: SparkContext, signal_index: int) -> list[Column]:
    """Return the metrics that a sink observes on `bounded` records.

    Parameters
    ----------
    context : pyspark.SparkContext
        The context of the session that uses them.
    signal_index : int
        The index of the signal class.
    """
    offset, first, end = map(F.col, ("offset", "bounds.first", "bounds.end"))
    is_outside = ~F.coalesce((offset >= first) & (offset < end), F.lit(False))
    place = F.concat_ws(" ", "topic", F.lit("partition"), "partition", F.lit("offset"), "offset")
    index = F.col("predicted_index").cast("int")
    return [
        F.count(F.lit(1)).alias("rows"),
        F.count(index).alias("events"),
        F.count_if(index == signal_index).alias("signal"),
        F.count("bad").alias("bad"),
        # As text, because Python gets arrays only since Spark 4.1.
        F.to_json(F.array_distinct(F.flatten(F.collect_set("unused")))).alias("unused"),
        F.count_if(is_outside).alias("outside"),
        F.min(F.when(is_outside, place)).alias("one_outside"),
    ]
