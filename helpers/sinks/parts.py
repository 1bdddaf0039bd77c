"""Read, check and merge the Parquet files of a sink."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pyspark.sql import DataFrame, SparkSession

from helpers.sinks.columns import stored_schema
from helpers.sinks.commits import Part
from helpers.sinks.errors import SinkError
from helpers.spark import (
    JAVA_ERRORS,
    exact_reader,
    flush_folder,
    folder_names,
    folder_size,
    java_class,
    remove_folder,
    summary,
)

# Target size of a merged file.
_FILE_SIZE = 64 * 1024**2


def read_parts(spark: SparkSession, path: str, parts: Iterable[Part], event_id: str) -> DataFrame:
    """Return the rows of a sink's files.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str
        The sink's path.
    parts : iterable of Part
        The files.
    event_id : str
        The column that identifies an event.
    """
    stored = stored_schema(event_id)
    files = [f"{path}/data/{part.folder}/{name}" for part in parts for name in part.files]
    if not files:
        return spark.createDataFrame([], stored)
    with _listed_by_the_driver(spark):
        return exact_reader(spark).schema(stored).parquet(*files)


def finished_part(spark: SparkSession, path: str, folder: str, rows: int, first: int) -> Part:
    """Return the files that Spark has written, once they are complete and on disk.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session that wrote them.
    path : str
        The sink's path.
    folder : str
        The files' folder in ``data``.
    rows : int
        The number of rows that Spark counted while writing.
    first : int
        The number of the first batch.

    Raises
    ------
    SinkError
        If the files have another number of rows, or can't be read.
    """
    uri = f"{path}/data/{folder}"
    files = [name for name in folder_names(spark, uri) if name.endswith(".parquet")]
    found = _count_rows(spark, [f"{uri}/{name}" for name in files])
    if found != rows:
        raise SinkError(
            f"Spark has written {rows} records to {uri}, but the driver finds {found} there. The "
            "driver and all executors must reach the same files: give a path on a file system "
            "that they share, such as hdfs:."
        )
    flush_folder(spark, uri, inside=path)  # including the entry of `data`
    return Part(first, 0, folder, files, rows, folder_size(spark, uri))


def with_size(spark: SparkSession, path: str, part: Part) -> Part:
    """Return a part with its size, which older versions didn't record.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    path : str
        The sink's path.
    part : Part
        The files.
    """
    return (
        part if part.size else replace(part, size=folder_size(spark, f"{path}/data/{part.folder}"))
    )


def merge(spark: SparkSession, path: str, group: list[Part], event_id: str) -> Part:
    """Merge several parts into one, and return it.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to use.
    path : str
        The sink's path.
    group : list of Part
        Parts of the same level.
    event_id : str
        The column that identifies an event.
    """
    first, level = group[0].first, group[0].level + 1
    folder = f"merged-{first:020d}-{uuid.uuid4()}"
    files = max(1, sum(part.size for part in group) // _FILE_SIZE)
    rows = read_parts(spark, path, group, event_id)
    try:
        rows.coalesce(files).write.parquet(f"{path}/data/{folder}")
        part = finished_part(spark, path, folder, sum(part.rows for part in group), first)
    except BaseException:
        with contextlib.suppress(Exception):  # must not hide the original error
            remove_folder(spark, f"{path}/data/{folder}")
        raise
    return replace(part, level=level)


def _count_rows(spark: SparkSession, files: Iterable[str]) -> int:
    """Return the total number of rows recorded in the footers of Parquet files."""
    configuration = spark._jsc.hadoopConfiguration()
    hadoop_path = java_class(spark, "org.apache.hadoop.fs.Path")
    of_path = java_class(spark, "org.apache.parquet.hadoop.util.HadoopInputFile").fromPath
    open_file = java_class(spark, "org.apache.parquet.hadoop.ParquetFileReader").open
    count = 0
    for file in files:
        try:
            reader = open_file(of_path(hadoop_path(file), configuration))
        except JAVA_ERRORS as error:
            reason = summary(error)
            raise SinkError(f"a file that Spark has just written can't be read: {reason}") from None
        count += reader.getRecordCount()
        reader.close()
    return count


@contextlib.contextmanager
def _listed_by_the_driver(spark: SparkSession) -> Iterator[None]:
    """Make Spark list files on the driver instead of in a job with a task per file."""
    name = "spark.sql.sources.parallelPartitionDiscovery.threshold"
    before = spark.conf.get(name)
    spark.conf.set(name, "1000000")
    try:
        yield
    finally:
        spark.conf.set(name, before)
