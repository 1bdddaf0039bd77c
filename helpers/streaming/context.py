"""Creates, runs and stops a streaming context."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.sql import SparkSession
from pyspark.streaming import StreamingContext

from helpers.spark import (
    END_SECONDS,
    JAVA_ERRORS,
    check_running,
    how_java_exited,
    java_has_exited,
    java_ran_out_of_memory,
    summary,
)
from helpers.streaming.batches import Batches, batches_of
from helpers.streaming.errors import StreamError

# How long a graceful stop waits for the planned batches.
FINISH_SECONDS = 60


def new_streaming_context(spark: SparkSession, batch_seconds: float) -> StreamingContext:
    """Return a streaming context; stop one that an earlier cell left running.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose executors do the work.
    batch_seconds : float
        The interval of the micro-batches.

    Raises
    ------
    SessionError
        If the session was stopped.
    ValueError
        If the interval is not a number between 0.001 and 86,400.

    Examples
    --------
    >>> ssc = new_streaming_context(spark, batch_seconds=1)
    """
    check_running(spark)
    if not (isinstance(batch_seconds, int | float) and 0.001 <= batch_seconds <= 86_400):
        raise ValueError(
            f"the batch interval is {batch_seconds!r}: it must be between 0.001 and 86,400 seconds."
        )
    active = StreamingContext.getActive()
    if active is not None:
        stop_streaming(active, gracefully=False)
    with warnings.catch_warnings():
        # The notebooks say that DStreams are Spark's older streaming; no warning is needed.
        warnings.simplefilter("ignore", FutureWarning)
        return StreamingContext(spark.sparkContext, batch_seconds)


def run_stream(ssc: StreamingContext, until: Callable[[], bool], timeout: float) -> None:
    """Start a streaming context, and stop it when a condition is true.

    However this ends (also by Ctrl-C or a kernel's interrupt), the context is stopped, and Spark
    keeps running.

    Parameters
    ----------
    ssc : pyspark.streaming.StreamingContext
        A context whose outputs are set up.
    until : callable
        Called a few times per second; the stream ends when it returns true.
    timeout : float
        The most seconds that this may take.

    Raises
    ------
    TimeoutError
        If the condition isn't true in time, or the last batch isn't done within 60 s after that.
    StreamError
        If a batch failed, or the stream was stopped from elsewhere.

    Examples
    --------
    >>> stream.foreachBatch(lambda df, batch_id: print(df.count(), "records"))
    >>> run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    100 records
    """
    deadline = time.monotonic() + timeout
    streams = batches_of(ssc)
    done = False
    with java_watched(), interrupt_noted() as interrupted:
        try:
            ssc.start()
            while not (done := until()) and not interrupted.is_set():
                if time.monotonic() > deadline:
                    raise TimeoutError(_not_done(streams, timeout))
                if ssc.awaitTerminationOrTimeout(0.1):
                    raise StreamError("the stream was stopped before it was done.")
        except (*JAVA_ERRORS, StreamError) as error:
            reason = next((each.error for each in streams if each.error), None) or summary(error)
            raise StreamError(f"the stream stopped: {reason}") from None
        finally:
            finished = stop_streaming(ssc, gracefully=bool(done))
    if interrupted.is_set():
        raise KeyboardInterrupt
    for stream in streams:
        if stream.error:
            raise StreamError(f"the stream stopped: {stream.error}")
    if not finished:
        raise TimeoutError(
            f"the last batch was not done {FINISH_SECONDS} s after the stream's end, and was not "
            "committed: the next stream of the group begins with it."
        )


def stop_streaming(ssc: StreamingContext, gracefully: bool) -> bool:
    """Stop a streaming context and its connections to Kafka, but not Spark.

    Parameters
    ----------
    ssc : pyspark.streaming.StreamingContext
        The context; it may have been stopped already.
    gracefully : bool
        Whether planned batches are finished and committed first, within 60 s. A stream with a
        checkpoint and an interval above 30 s repeats its last batch when it is started again, with
        the same offsets.

    Returns
    -------
    bool
        Whether they were finished.
    """
    streams = batches_of(ssc)
    if gracefully:
        # Spark reports a batch's end with a delay, and not at all once it is stopped.
        finished = [stream.finish(FINISH_SECONDS) for stream in streams]
        gracefully = all(finished)
    if not gracefully:
        for stream in streams:
            stream.abandon()
    # Spark's own graceful stop waits for the next two intervals, however long they are. Only a
    # checkpoint needs it, in which it notes that the last batch is done; otherwise a restart
    # repeats that batch.
    java = ssc._jssc.ssc()
    interval = java.graph().batchDuration().milliseconds() / 1000
    has_checkpoint = java.checkpointDir() is not None and 2 * interval <= FINISH_SECONDS
    spark_waits = gracefully and (has_checkpoint or not streams)
    if gracefully and not spark_waits:
        _wait_for_outputs(ssc)
    ssc.stop(stopSparkContext=False, stopGraceFully=spark_waits)
    for stream in streams:
        stream.close()
    return gracefully


def _wait_for_outputs(ssc: StreamingContext) -> None:
    """Wait until no batch runs, such as one without new records in a window."""
    scheduler, deadline = ssc._jssc.ssc().scheduler(), time.monotonic() + FINISH_SECONDS
    while not scheduler.getPendingTimes().isEmpty() and time.monotonic() < deadline:
        time.sleep(0.02)


@contextlib.contextmanager
def java_watched() -> Iterator[None]:
    """Raise `StreamError` with the reason if Java dies within a ``with`` block.

    Python itself notices only a refused connection.

    Examples
    --------
    >>> with java_watched():
    ...     pass
    """
    try:
        yield
    except (Py4JError, ConnectionError, StreamError) as error:
        # A failed batch has its own reason, unless Java was already dying.
        has_reason = isinstance(error, (Py4JJavaError, StreamError))
        if (has_reason and not java_ran_out_of_memory()) or not java_has_exited(END_SECONDS):
            raise
        raise StreamError(how_java_exited()) from None


@contextlib.contextmanager
def interrupt_noted() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, which must not interrupt a call to Java.

    PySpark's handler does: it cancels the jobs from within the current call, and leaves the
    connection unusable. A second Ctrl-C interrupts as usual. If the program has installed a
    handler, that stays.
    """
    interrupted = threading.Event()
    usual = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    is_of_pyspark = getattr(usual, "__module__", "").startswith("pyspark.")
    is_default = usual is signal.default_int_handler or is_of_pyspark
    if threading.current_thread() is not threading.main_thread() or not is_default:
        yield interrupted
        return

    def note(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


def _not_done(streams: list[Batches], seconds: float) -> str:
    """Return the message that streams were not done in time, with what to do."""
    help_ = "Give it more time, or look at Spark's log."
    if any(stream.is_waiting for stream in streams):
        help_ = "Its broker gives no answer: check that it is running, then start the stream again."
    return (
        f"the stream was not done after {seconds:.0f} s and was stopped; committed batches are "
        f"kept. {help_}"
    )
