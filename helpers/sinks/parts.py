"""Read, check and merge the Parquet files of a sink."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable
from dataclasses import replace

from pyspark.sql import DataFrame, SparkSession

from helpers.sinks.columns import stored_schema
from helpers.sinks.commits import Part
from helpers.sinks.errors import SinkError
from helpers.spark import (
    JAVA_ERRORS,
    changed_settings,
    exact_reader,
    flush_folder,
    folder_names,
    folder_size,
    java_class,
    remove_folder,
    separate_session,
    summary,
)

# Spark lists files on the driver instead of in a job with a task per file.
_LISTED_BY_THE_DRIVER = {"spark.sql.sources.parallelPartitionDiscovery.threshold": "1000000"}

_WRITING = {
    # A file _SUCCESS would be superfluous beside a sink's manifest.
    "mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
    # By default, Parquet checks how much it keeps in memory after 100 rows, and then after up to
    # 10,000, however large they are.
    "parquet.page.size.row.check.min": "1",
    "parquet.page.size.row.check.max": "10",
}

# Otherwise, Spark reads thousands of rows at a time, and passes them on to Python, however large.
_ROW_BY_ROW = {
    "spark.sql.parquet.enableVectorizedReader": "false",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "16",
}

# Target size of a merged file.
_FILE_SIZE = 64 * 1024**2


class PartFiles:
    """The Parquet files of a sink's parts.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read and write with.
    path : str
        The sink's path.
    event_id : str
        The column that identifies an event.
    """

    def __init__(self, spark: SparkSession, path: str, event_id: str) -> None:
        self._spark, self._path, self._schema = spark, path, stored_schema(event_id)
        self._row_by_row: SparkSession | None = None  # reads large records

    def folder(self, name: str) -> str:
        """Return the path of a folder of files."""
        return f"{self._path}/data/{name}"

    def remove(self, name: str) -> None:
        """Remove a folder of files."""
        remove_folder(self._spark, self.folder(name))

    def write(self, rows: DataFrame, name: str) -> None:
        """Write rows to the files of a new folder."""
        rows.write.options(**_WRITING).parquet(self.folder(name))

    def existing(self, folder: str) -> set[str]:
        """Return the folders in ``data``, and in the parent of a batch's folder."""
        parent = folder.partition("/")[0]
        beside = {f"{parent}/{name}" for name in folder_names(self._spark, self.folder(parent))}
        return beside.union(folder_names(self._spark, self.folder("")))

    def read(self, parts: Iterable[Part]) -> DataFrame:
        """Return the rows of parts."""
        return self._read(self._spark, parts)

    def read_row_by_row(self, parts: Iterable[Part]) -> DataFrame:
        """Return the rows of parts, which may be large ones, in a separate session."""
        if self._row_by_row is None:
            self._row_by_row = separate_session(self._spark, _ROW_BY_ROW)
        return self._read(self._row_by_row, parts)

    def finished(self, name: str, rows: int, first: int) -> Part:
        """Return the part that Spark wrote, once its files are complete and on disk.

        Parameters
        ----------
        name : str
            The files' folder.
        rows : int
            The number of rows that Spark counted while writing.
        first : int
            The number of the first batch.

        Raises
        ------
        SinkError
            If the files have another number of rows, or can't be read.
        """
        folder = self.folder(name)
        files = [file for file in folder_names(self._spark, folder) if file.endswith(".parquet")]
        found = _count_rows(self._spark, [f"{folder}/{file}" for file in files])
        if found != rows:
            raise SinkError(
                f"Spark wrote {rows} records to {folder}, but the driver finds {found} "
                "there. The driver and all executors must reach the same files: give a path on a "
                "file system that they share, such as hdfs:."
            )
        flush_folder(self._spark, folder, inside=self._path)  # including the entry of `data`
        return Part(first, 0, name, files, rows, folder_size(self._spark, folder))

    def merge(self, group: list[Part]) -> Part:
        """Merge several parts of the same level into one, and return it."""
        first, level = group[0].first, group[0].level + 1
        name = f"merged-{first:020d}-{uuid.uuid4()}"
        files = max(1, sum(part.size for part in group) // _FILE_SIZE)
        try:
            self.write(self.read_row_by_row(group).coalesce(files), name)
            part = self.finished(name, sum(part.rows for part in group), first)
        except BaseException:
            with contextlib.suppress(Exception):  # must not hide the original error
                self.remove(name)
            raise
        return replace(part, level=level)

    def _read(self, spark: SparkSession, parts: Iterable[Part]) -> DataFrame:
        files = [f"{self.folder(part.folder)}/{name}" for part in parts for name in part.files]
        if not files:
            return spark.createDataFrame([], self._schema)
        with changed_settings(spark, _LISTED_BY_THE_DRIVER):
            return exact_reader(spark).schema(self._schema).parquet(*files)


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
