"""Errors from Java: one sentence with the reason, whatever wraps it."""

import re

import pytest

from helpers.spark import JAVA_ERRORS, JarsError, JsonFolder, cause_name, full_path, summary

LOST = """\
org.apache.spark.sql.streaming.StreamingQueryException: [STREAM_FAILED] Query [id = 1] terminated \
with exception: [KAFKA_DATA_LOSS.PARTITIONS_DELETED] Some data may have been lost
Reason:
Partitions {events-1} have been deleted. SQLSTATE: XXKST
=== Streaming Query ===
Logical Plan:
WriteToMicroBatchDataSource ForeachBatchSink
+- ~StreamingDataSourceV2ScanRelation[key#7, value#8] KafkaTable
\tat org.apache.spark.sql.execution.streaming.StreamExecution.run(StreamExecution.scala:3)
Caused by: java.lang.IllegalStateException: [KAFKA_DATA_LOSS.PARTITIONS_DELETED] Some data may \
have been lost because they are not available in Kafka any more;
either the data was aged out by Kafka
Reason:
Partitions {events-1} have been deleted.
\tat org.apache.spark.sql.kafka010.KafkaSource.reportDataLoss(KafkaSource.scala:5)
\t... 9 more
"""

IN_A_FUNCTION = """\
org.apache.spark.SparkException: An exception was raised by Python:
Traceback (most recent call last):
  File "util.py", line 69, in call
    r = self.func(t, *rdds)
py4j.protocol.Py4JJavaError: An error occurred while calling o77.parquet.
: org.apache.spark.SparkException: Job aborted due to stage failure: Task 0 in stage 1.0 failed
\tat org.apache.spark.scheduler.DAGScheduler.abort(DAGScheduler.scala:1)
Caused by: java.io.IOException: No space left on device
\tat java.base/java.io.FileOutputStream.write(Native Method)
Caused by: java.lang.NullPointerException
\t... 7 more
"""

ONLY_AS_TEXT = """\
org.apache.spark.SparkException: Job aborted due to stage failure: Task 0 in stage 1.0 failed 4 \
times, most recent failure: Lost task 0.3 in stage 1.0 (TID 9) (host executor driver): \
java.net.UnknownHostException: store
\tat java.base/java.net.InetAddress.getAllByName(InetAddress.java:1)

Driver stacktrace:
\tat org.apache.spark.scheduler.DAGScheduler.abort(DAGScheduler.scala:1)
"""

CHAINED = """\
Traceback (most recent call last):
  File "sink.py", line 1, in write
KeyError: 'batch'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "sink.py", line 3, in write
helpers.sinks.errors.SinkError: another job writes to scored: end it. Nothing is committed.
"""


@pytest.mark.parametrize(
    "text, reason",
    [
        (LOST, "Partitions {events-1} have been deleted."),
        (IN_A_FUNCTION, "java.io.IOException: No space left on device"),
        (ONLY_AS_TEXT, "java.net.UnknownHostException: store"),
        (CHAINED, "helpers.sinks.errors.SinkError: another job writes to scored: end it. Nothing "
                  "is committed."),
        ("[NO_COLUMN] Column `a` cannot be resolved. SQLSTATE: 42703;\n'Project ['a]\n+- Range\n",
         "[NO_COLUMN] Column `a` cannot be resolved. SQLSTATE: 42703"),
        ("java.lang.Error: the outer\n\tat a.B\nCaused by: java.lang.Exception: null\n\tat c.D",
         "java.lang.Error: the outer"),
        ("An error occurred while calling o1.x.\n: java.lang.NullPointerException\n\tat a.B",
         "java.lang.NullPointerException"),
        ("Traceback (most recent call last):\n  File\nAssertionError\n", "AssertionError"),
        ("the disk is full", "the disk is full"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_reason_is_what_the_innermost_exception_says(text, reason):
    """Neither a line of a stack nor of a plan is taken for the reason."""
    assert summary(text) == reason


@pytest.mark.parametrize(
    "do, reason",
    [
        (lambda spark: spark.range(1).select("none"), r"\[UNRESOLVED_COLUMN.*`none` cannot be res"),
        (lambda spark: spark.sql("SELECT raise_error('the detector is off')").collect(),
         "the detector is off"),
        (lambda spark: spark.range(1).rdd.map(lambda row: {}[row.id]).collect(), "^KeyError: 0$"),
        (lambda spark: spark.read.parquet("/no/such/folder"), r"\[PATH_NOT_FOUND\] .*/no/such/f"),
        (lambda spark: spark._jvm.java.lang.Class.forName("no.Such"), r"NotFoundException: no\.Su"),
    ],
)  # fmt: skip
def test_the_reasons_of_real_errors_are_one_line(spark, do, reason):
    """It doesn't matter whether py4j raises the error or PySpark replaces it with its own."""
    with pytest.raises(JAVA_ERRORS) as caught:
        do(spark)
    told = summary(caught.value)
    assert "\n" not in told
    assert re.search(reason, told), told


def test_both_kinds_of_error_name_the_cause(spark):
    """PySpark replaces some errors of py4j's; those have their Java exception elsewhere."""
    with pytest.raises(JAVA_ERRORS) as replaced:
        spark._jvm.java.lang.Integer.parseInt("ten")
    with pytest.raises(JAVA_ERRORS) as kept:
        spark._jvm.java.lang.Class.forName("no.Such")
    assert cause_name(replaced.value) == "NumberFormatException"
    assert cause_name(kept.value) == "ClassNotFoundException"


@pytest.mark.parametrize(
    "name, error, reason",
    [
        ("s3a://bucket/scored", JarsError,
         r"lacks the jar that s3a: needs.*packages org\.apache\.hadoop:hadoop-aws:3\.\d+\.\d+\."),
        ("abfss://container/scored", JarsError, r"hadoop-azure:3\."),
        ("nonsense://scored", JarsError, r"Spark has no file system for 'nonsense'"),
        ("file://scored/x", ValueError, r"names a host, .*: write file:///scored/x\.$"),
        ("FILE://scored", ValueError, r"names a host, .*: write file:///scored\.$"),
        ("", ValueError, r"the path '' is empty.*: choose another name\."),
    ],
)  # fmt: skip
def test_a_path_that_spark_cannot_use_is_one_sentence(spark, name, error, reason):
    """A missing jar is named with the way to add it, and so is what is wrong with a path."""
    for use in (full_path, JsonFolder):
        with pytest.raises(error, match=reason) as told:
            use(spark, name)
        assert "\n" not in str(told.value)
