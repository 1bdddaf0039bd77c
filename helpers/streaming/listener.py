"""Connects a stream's batches with their streaming context."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from py4j.java_gateway import JavaObject
from pyspark import SparkContext
from pyspark.streaming import StreamingListener

from helpers.spark import JAVA_ERRORS, summary

if TYPE_CHECKING:
    from helpers.streaming.batches import Batches


class ContextListener(StreamingListener):
    """Reports the events of a streaming context to a stream's batches.

    Parameters
    ----------
    batches : Batches
        The batches, which are notified when a batch is submitted and when it ends.

    Attributes
    ----------
    context : py4j.java_gateway.JavaObject or None
        Java's ``StreamingContext``; None until it is joined.
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches
        self._joining = threading.Lock()
        self.context: JavaObject | None = None

    def join(self, context: JavaObject) -> None:
        """Join a streaming context, unless one was already joined."""
        with self._joining:
            if self.context is not None:
                return
            self.context = context
        jvm = SparkContext._active_spark_context._jvm
        listener = jvm.PythonStreamingListenerWrapper(self)
        context.addStreamingListener(jvm.JavaStreamingListenerWrapper(listener))
        # A recovered context may have completed batches before the listener was added.
        for batch in _as_list(context.progressListener().retainedCompletedBatches()):
            outputs = _as_list(batch.outputOperations().values().toSeq())
            failures = [output.failureReason() for output in outputs]
            reasons = [failure.get() for failure in failures if failure.isDefined()]
            self._report(batch.batchTime().milliseconds(), batch.submissionTime(), reasons)

    def join_when_active(self) -> None:
        """Join the context that Spark has recovered from a checkpoint, once it is active."""
        # In a thread, because the call blocks until Spark has planned the first batches.
        threading.Thread(target=self._join_active, daemon=True).start()

    def is_of(self, context: JavaObject) -> bool:
        """Return whether the stream is part of one of Java's streaming contexts."""
        if self.context is None and context.isCheckpointPresent():
            self.join(context)  # Spark has just recovered both from the same checkpoint
        return self.context is not None and self.context == context

    def is_over(self) -> bool:
        """Return whether the context is stopped, whoever stopped it."""
        return self.context is not None and self.context.getState().toString() == "STOPPED"

    def checkpoint(self) -> str | None:
        """Return the folder of the context's checkpoint; None if it has none."""
        return None if self.context is None else self.context.checkpointDir()

    def stop(self, reason: str, first: Callable[[], None]) -> None:
        """Call a function, and stop the context for a reason, which `awaitTermination` raises."""
        if self.context is None:  # not started yet: starting it raises the error
            return
        exception = SparkContext._active_spark_context._jvm.java.lang.RuntimeException(reason)
        self.context.scheduler().reportError(reason, exception)

        def stop() -> None:
            first()
            # Again, because the checkpoints that were not written are reported as errors as well.
            with contextlib.suppress(*JAVA_ERRORS):  # the context may be stopped by now
                self.context.scheduler().reportError(reason, exception)
            self.context.stop(False, False)

        # In a thread that the context doesn't wait for.
        threading.Thread(target=stop, daemon=True).start()

    def onBatchSubmitted(self, batchSubmitted: Any) -> None:  # noqa: N802, N803
        """Report a new batch; Spark calls this."""
        info = batchSubmitted.batchInfo()
        self._batches.ledger.submit(info.batchTime().milliseconds(), info.submissionTime())

    def onBatchCompleted(self, batchCompleted: Any) -> None:  # noqa: N802, N803
        """Report a batch's end, and why one of its outputs failed, if one did; Spark calls this."""
        info = batchCompleted.batchInfo()
        outputs = info.outputOperationInfos()
        failures = [outputs[number].failureReason() for number in outputs]
        reasons = [failure for failure in failures if failure is not None]
        times = info.processingEndTime(), info.processingDelay(), info.schedulingDelay()
        self._report(info.batchTime().milliseconds(), info.submissionTime(), reasons, *times)

    def _report(
        self, batch_id: int, submitted_at: int, failures: Iterable[str], *times: int
    ) -> None:
        self._batches.ledger.submit(batch_id, submitted_at)  # in case the listener was added later
        # Spark drops events when its queue is full. One batch runs at a time, so the earlier ones
        # have ended, and if one had failed, the context would know. It also knows of an interval
        # for which Spark couldn't make a batch. That interval's plan must not pass for done with
        # the next batch.
        failure = self.failure()
        missed = [each for each in self._batches.ledger.waiting() if each < batch_id]
        if missed and _one_at_a_time():
            for earlier in missed:
                self._batches.completed(earlier, failure)
        reason = next(map(summary, failures), None)
        if reason is None and failure is not None:
            self._batches.context_failed(failure)
        else:
            self._batches.completed(batch_id, reason, *times)

    def failure(self) -> str | None:
        """Return why the context has failed to make or run a batch; None if it has not."""
        if self.context is None:
            return None
        try:
            self.context.awaitTerminationOrTimeout(0)
        except JAVA_ERRORS as error:
            return summary(error).removeprefix("_pickle.PicklingError: ")
        return None

    def _join_active(self) -> None:
        contexts = SparkContext._active_spark_context._jvm.org.apache.spark.streaming
        active = contexts.StreamingContext.getActive()
        if active.isDefined():  # otherwise it failed to start
            self.join(active.get())


def _one_at_a_time() -> bool:
    """Return whether Spark runs one batch at a time, as it does by default."""
    settings = SparkContext._active_spark_context.getConf()
    return settings.get("spark.streaming.concurrentJobs", "1") == "1"


def _as_list(scala_sequence: JavaObject) -> list[JavaObject]:
    return [scala_sequence.apply(index) for index in range(scala_sequence.size())]
