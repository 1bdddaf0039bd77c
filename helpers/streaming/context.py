"""A streaming context from its start to its end: by a condition, a deadline, or an error."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkContext
from pyspark.sql import SparkSession
from pyspark.streaming import StreamingContext

from helpers.spark import JAVA_ERRORS, check_running, log_file, summary
from helpers.streaming.batches import Batches, batches_of
from helpers.streaming.errors import StreamError

# How long Java may take to end, once it has stopped answering.
END_SECONDS = 10

# How long a graceful stop waits for the batches that are planned.
FINISH_SECONDS = 60


def new_streaming_context(spark: SparkSession, batch_seconds: float) -> StreamingContext:
    """Return a streaming context; one that is still running from an earlier cell is stopped.

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

    Examples
    --------
    >>> ssc = new_streaming_context(spark, batch_seconds=1)
    """
    check_running(spark)
    active = StreamingContext.getActive()
    if active is not None:
        stop_streaming(active, gracefully=False)
    with warnings.catch_warnings():
        # That DStreams are Spark's older streaming is for the text to say, not for a warning.
        warnings.simplefilter("ignore", FutureWarning)
        return StreamingContext(spark.sparkContext, batch_seconds)


def run_stream(ssc: StreamingContext, until: Callable[[], bool], timeout: float) -> None:
    """Start a streaming context, and stop it when a condition is true.

    However this ends (also by Ctrl-C or a kernel's interrupt), the context is stopped, and Spark
    goes on.

    Parameters
    ----------
    ssc : pyspark.streaming.StreamingContext
        A context whose outputs are set up.
    until : callable
        Is asked a few times a second; the stream ends when it returns true.
    timeout : float
        Seconds that this may take.

    Raises
    ------
    TimeoutError
        If the condition isn't true in time, or the last batch isn't done 60 s after that.
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
            reasons = [stream.error for stream in streams if stream.error]
            reason = reasons[0] if reasons else summary(error)
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
        Whether batches that are planned are finished and committed first, for 60 s at most.

    Returns
    -------
    bool
        Whether they were.
    """
    streams = batches_of(ssc)
    if gracefully:
        # Spark tells of a batch's end a little later, and once stopped not at all.
        finished = [stream.finish(FINISH_SECONDS) for stream in streams]
        gracefully = all(finished)
    if not gracefully:
        for stream in streams:
            stream.abandon()
    ssc.stop(stopSparkContext=False, stopGraceFully=gracefully)
    for stream in streams:
        stream.close()
    return gracefully


@contextlib.contextmanager
def java_watched() -> Iterator[None]:
    """Raise `StreamError` with the reason if Java dies within a ``with`` block.

    Python notices only that a connection is refused.

    Examples
    --------
    >>> with java_watched():
    ...     pass
    """
    try:
        yield
    except (Py4JError, ConnectionError, StreamError) as error:
        # A batch that failed has its own reason, unless Java was about to die of it.
        has_reason = isinstance(error, (Py4JJavaError, StreamError))
        if (has_reason and not _has_lacked_memory()) or not _java_has_ended():
            raise
        raise StreamError(_how_java_ended()) from None


@contextlib.contextmanager
def interrupt_noted() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, which must not break into an exchange with Java.

    PySpark's own reaction does: it cancels the jobs from within whatever call is under way, and
    leaves the connection unusable. A second Ctrl-C interrupts as usual. A program that has its own
    reaction to Ctrl-C keeps it.
    """
    interrupted = threading.Event()
    usual = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    is_default = usual is signal.default_int_handler or _is_of_pyspark(usual)
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


def _java_has_ended() -> bool:
    """Return whether the Java that this process has started is gone."""
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:  # spark-submit started it, and this process after it
        return False
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _has_lacked_memory() -> bool:
    """Return whether Java's log says that memory was missing."""
    file = log_file()
    return file.exists() and "OutOfMemoryError" in file.read_text(errors="replace")


def _how_java_ended() -> str:
    """Return why Java ended, as far as its log says, and what helps."""
    if _has_lacked_memory():
        return (
            "Java ran out of memory and ended; what was committed is kept. Give it more, by "
            'get_spark(memory="4g") or spark-submit --driver-memory 4g, or smaller batches, by '
            "spark.streaming.kafka.maxRatePerPartition or max.poll.records. "
            f"Its log is {log_file()}."
        )
    return (
        f"Java ended by itself; what was committed is kept. Its log, {log_file()}, has the reason; "
        "where it has none, the system may have ended it to free memory."
    )


def _is_of_pyspark(handler: object) -> bool:
    return getattr(handler, "__module__", "").startswith("pyspark.")


def _not_done(streams: list[Batches], seconds: float) -> str:
    """Return that streams were not done in time, and what may help."""
    help_ = "Give it more time, or look at Spark's log."
    if any(stream.is_waiting for stream in streams):
        help_ = "Its broker gives no answer: check that it runs, then start the stream again."
    return (
        f"the stream was not done after {seconds:.0f} s and was stopped; what it committed is "
        f"kept. {help_}"
    )
