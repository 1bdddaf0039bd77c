"""Helpers for tests that read topics with kafka-python, unlike the kit's streams."""

from __future__ import annotations

from kafka import KafkaConsumer, TopicPartition
from processes import wait_until

from helpers.broker import LocalKafka


def read_to_end(kafka: LocalKafka, topic: str, **settings) -> list:
    """Return a topic's records up to its current end, without those of aborted transactions."""
    servers = {"bootstrap_servers": kafka.bootstrap_servers}
    with KafkaConsumer(**servers) as consumer:  # the end, including records that can't be read yet
        numbers = consumer.partitions_for_topic(topic) or ()
        partitions = [TopicPartition(topic, number) for number in numbers]
        ends = consumer.end_offsets(partitions)
    settings = {**servers, "auto_offset_reset": "earliest", **settings}
    with KafkaConsumer(**settings, isolation_level="read_committed") as consumer:
        consumer.assign(partitions)
        records = []

        def is_read() -> bool:
            for found in consumer.poll(timeout_ms=200).values():
                records.extend(found)
            places = {part: consumer.position(part, timeout_ms=5_000) or 0 for part in ends}
            return all(places[part] >= end for part, end in ends.items())

        wait_until(is_read)
    return records
