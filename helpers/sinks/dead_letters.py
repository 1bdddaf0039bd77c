"""Bad records and predictions as records of Kafka topics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from helpers.higgs import EVENT_ID
from helpers.records import vector_entries
from helpers.streaming.settings import modern_settings, use_added_jars

DEAD_LETTERS = ".dead-letter"  # what the name of a topic's dead letters ends in


def send_dead_letters(bad: DataFrame, settings: Mapping[str, str]) -> None:
    """Send bad records to their topics' dead letters, with their keys and bytes.

    A batch that is done again sends its dead letters again; the headers tell which are the same.

    Parameters
    ----------
    bad : pyspark.sql.DataFrame
        With ``topic``, ``partition``, ``offset``, ``event_time`` and ``bad``, a struct of ``key``,
        ``value`` and ``reason``.
    settings : mapping
        Settings of a Kafka client by Kafka's names.
    """
    headers = {
        "topic": F.col("topic"),
        "partition": F.col("partition"),
        "offset": F.col("offset"),
        "timestamp": F.unix_millis("event_time"),
        "reason": F.col("bad.reason"),
    }
    fields = [
        F.struct(F.lit(name).alias("key"), value.cast("string").cast("binary").alias("value"))
        for name, value in headers.items()
    ]
    letters = bad.select(
        F.concat("topic", F.lit(DEAD_LETTERS)).alias("topic"),
        F.col("bad.key").alias("key"),
        F.col("bad.value").alias("value"),
        F.array(*fields).alias("headers"),
    )
    _send(letters.coalesce(1), settings)


def send_predictions(scored: DataFrame, settings: Mapping[str, str], topic: str) -> None:
    """Send predictions to a topic of Kafka, each keyed by its event's id.

    **At least once:** a batch that is done again is sent again, and a reader has to expect an event
    twice. Its headers say which record it was scored from, and so which ones are the same.

    Parameters
    ----------
    scored : pyspark.sql.DataFrame
        As for `ParquetSink.write`; bad records are not sent.
    settings : mapping
        Settings of a Kafka client by Kafka's names.
    topic : str
        Where to.

    Examples
    --------
    >>> send_predictions(scored, {"bootstrap.servers": kafka.bootstrap_servers}, "predictions")
    """
    headers = [
        F.struct(F.lit(name).alias("key"), F.col(name).cast("string").cast("binary").alias("value"))
        for name in ("topic", "partition", "offset")
    ]
    content = F.struct(
        EVENT_ID,
        vector_entries(F.col("prediction")).alias("probabilities"),
        F.col("prediction_index").cast("int").alias("predicted_index"),
    )
    messages = scored.where("bad IS NULL").select(
        F.lit(topic).alias("topic"),
        F.col(EVENT_ID).cast("string").alias("key"),
        F.to_json(content).alias("value"),
        F.array(*headers).alias("headers"),
    )
    _send(messages, settings)


def _send(messages: DataFrame, settings: Mapping[str, str]) -> None:
    """Write records to Kafka with Spark's own sink."""
    spark = messages.sparkSession
    use_added_jars(spark)
    known = set(spark._jvm.org.apache.kafka.clients.producer.ProducerConfig.configNames())
    options: dict[str, Any] = {
        f"kafka.{name}": value
        for name, value in modern_settings(settings).items()
        if name in known and not name.endswith(".serializer")
    }
    messages.write.format("kafka").options(**options).save()
