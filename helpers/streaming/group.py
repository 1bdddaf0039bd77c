"""Commits a query's offsets to a consumer group, so that Kafka's tools show its lag."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping

from pyspark.sql import SparkSession

from helpers.kafka_settings import ANSWER_SECONDS
from helpers.spark import summary
from helpers.streaming.client import KafkaClient
from helpers.streaming.errors import StreamError, without_secrets
from helpers.streaming.offsets import TopicAndPartition

_LOGGER = logging.getLogger(__name__)

Offsets = Mapping[TopicAndPartition, int]


class GroupProgress:
    """Commits how far a query has read to its consumer group, without joining the group.

    The query never resumes from these offsets. They are committed in the background: a commit that
    fails is reported once, and neither stops nor delays the query. Offsets that another program
    has committed are not replaced, because that program may resume from them; and if the group has
    members, Kafka refuses the commit. (A program that commits between the query's look and its
    commit is not seen, so each program needs a separate group.)

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names, with a ``group.id``.
    topic_ids : mapping of str to str
        The ids of the query's topics, by name.

    Raises
    ------
    StreamError
        If Kafka's client refuses the settings.

    Examples
    --------
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers, "group.id": "scoring"}
    >>> client = KafkaClient(spark, settings)
    >>> progress = GroupProgress(spark, settings, client.topic_ids(["events"]))
    >>> progress.commit(lambda: {TopicAndPartition("events", 0): 100})
    >>> progress.close()
    >>> list(client.committed([TopicAndPartition("events", 0)]).values())
    [Committed(offset=100, topic_id=..., by_query=True)]
    >>> client.close()
    """

    def __init__(
        self, spark: SparkSession, settings: Mapping[str, str], topic_ids: Mapping[str, str]
    ) -> None:
        self._client, self._topic_ids = KafkaClient(spark, settings), topic_ids
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._lock = threading.Lock()  # batches commit in Spark's thread, idle queries in Python's
        self._last: concurrent.futures.Future | None = None
        self._ours: Offsets = {}  # the last commit, unless its outcome is unknown
        self._has_warned = self._is_closed = False

    def commit(self, offsets: Callable[[], Offsets]) -> None:
        """Commit offsets soon; a commit that has not begun by then is left out.

        Parameters
        ----------
        offsets : callable
            Returns the next offset to read of each partition.
        """
        with self._lock:
            if self._last is not None:
                self._last.cancel()
            self._last = self._thread.submit(self._try_to_commit, offsets)

    def wait(self) -> None:
        """Wait for the last commit, no longer than Kafka may take for an answer."""
        if self._last is not None:
            concurrent.futures.wait([self._last], ANSWER_SECONDS)

    def close(self) -> None:
        """Close the connections to Kafka, after the last commit; again, it does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        closing = self._thread.submit(self._client.close)  # a client belongs to one thread
        self._thread.shutdown(wait=False)
        concurrent.futures.wait([closing], ANSWER_SECONDS)

    def _try_to_commit(self, offsets: Callable[[], Offsets]) -> None:
        try:
            self._commit(offsets())
            self._has_warned = False
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                _LOGGER.warning(
                    "the query's offsets can't be committed to group %r, so Kafka's tools don't "
                    "show its lag; the query continues, and tries again later. %s",
                    self._client.settings["group.id"],
                    without_secrets(summary(error), self._client.settings),
                )

    def _commit(self, offsets: Offsets) -> None:
        """Commit offsets, unless others have committed or the topics were created again."""
        self._client.topic_ids(self._topic_ids, self._topic_ids)
        for partition, committed in self._client.committed(offsets).items():
            is_ours = committed.offset == self._ours.get(partition, committed.offset)
            if not (committed.by_query and is_ours):
                raise StreamError(
                    f"Offset {committed.offset} of {partition.topic}, partition "
                    f"{partition.partition}, was committed by another program, which may resume "
                    "from it: give the query another group.id."
                )
        self._ours = {}
        self._client.commit(offsets, self._topic_ids, by_query=True)
        self._ours = offsets
