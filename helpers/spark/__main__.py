"""Prepare this machine's Spark: ``python -m helpers.spark`` fetches jars and writes an archive.

Most of Spark's startup time is spent on loading and verifying ten thousand classes. With an archive
of these classes as they are in memory ("class data sharing"), startup takes 8 s of processor time
instead of 15. `get_spark` uses the archive if it exists.
"""

from __future__ import annotations

import subprocess
import sys

from pyspark import SparkContext
from pyspark.sql import functions as F

from helpers.spark import (
    JAVA_ERRORS,
    JarsError,
    SessionError,
    fetch,
    get_spark,
    new_archive,
    scratch_folder,
    spark_program,
)

WRITE_SECONDS = 300


def write_class_archive() -> None:
    """Start Spark, run a typical job, and let Java write the archive when it exits."""
    with new_archive(spark_program()) as option:
        options = f'-Djava.io.tmpdir="{scratch_folder()}" "{option}"'
        spark = get_spark(cores=2, config={"spark.driver.extraJavaOptions": options})
        rows = str(scratch_folder() / "rows")
        df = spark.range(1_000).groupBy((F.col("id") % 3).alias("key")).agg(F.sum("id"))
        df.write.parquet(rows)
        spark.read.parquet(rows).collect()
        gateway = SparkContext._gateway
        spark.stop()
        gateway.shutdown()
        gateway.proc.stdin.close()
        gateway.proc.wait(WRITE_SECONDS)


if __name__ == "__main__":
    try:
        fetch()
    except (JarsError, SessionError) as error:
        sys.exit(str(error))
    try:
        write_class_archive()
    except (*JAVA_ERRORS, SessionError, OSError, subprocess.TimeoutExpired) as error:
        print(f"Spark will start more slowly: {error}", file=sys.stderr)
