"""Read the published event files into pandas or Spark.

Both use pandas' parser, so they accept the same files and return the same values.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    StringType,
    StructField,
    StructType,
)

from helpers.higgs.columns import (
    BOOKKEEPING,
    EVENT_ID,
    FEATURES,
    INTEGERS,
    LABEL,
    LABELS,
    MISSING,
    SOURCE,
    spark_type,
)
from helpers.spark import exact_path, exact_reader, file_size, full_path

# Kaggle's test file, the generator's events, Kaggle's training file, CERN's file.
_LAYOUTS = ((), (LABEL,), ("Weight", LABEL), BOOKKEEPING)

_TEXTS = (LABEL, "KaggleSet")
_SETS = ("t", "b", "v", "u")  # training, leader board, final ranking, unused: CERN's record 328
_ROWS = 10_000  # parsed at a time
_SURPLUS = ["surplus 1", "surplus 2", "surplus 3"]  # for values that are in no column
# Names of local files that Hadoop can't open, because of a colon, or that Spark ignores.
_UNREADABLE = re.compile(r"^[._]|:")
_OF_MACOS = re.compile(r"^__MACOSX/|(^|/)\.DS_Store$")
_CONTENT = StructType().add("content", BinaryType())
_EMPTY = f"is empty: download it again from {SOURCE}."
_VERDICT = StructType().add("columns", ArrayType(StringType())).add("fault", StringType())


def read_events(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a file of the Higgs boson challenge.

    Parameters
    ----------
    path : str or path-like
        A CSV file in UTF-8, plain or compressed (gzip, bzip2, xz, Zstandard, or a ZIP archive with
        one file), with the columns of CERN's file (35), Kaggle's training file (33),
        Kaggle's test file (31, no classes) or `generate_events` (32), in any order.

    Returns
    -------
    pandas.DataFrame
        One row per event. The columns are those of the file, in the published order: `EVENT_ID`
        (int64), the 30 `FEATURES` (float64 in GeV or radians, ``PRI_jet_num`` int64) and the
        `BOOKKEEPING` columns that the file contains.

    Raises
    ------
    FileNotFoundError
        If `path` is not a file.
    ValueError
        If the file is not a CSV file, or a column is missing, unknown, or contains invalid values.

    References
    ----------
    CERN Open Data record 328 [2]_.

    Examples
    --------
    >>> import tempfile
    >>> from helpers.higgs import generate_events
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "events.csv.gz")
    ...     generate_events(5, seed=1).to_csv(path, index=False)
    ...     read_events(path).shape
    (5, 32)
    """
    if not Path(path).is_file():
        raise _no_file(path)
    return pd.concat(_parsed(Path(path).read_bytes(), os.fspath(path)), ignore_index=True)


def read_events_in_spark(spark: SparkSession, path: str | os.PathLike[str]) -> DataFrame:
    """Read a file of the Higgs boson challenge with Spark, from any of Spark's file systems.

    A Spark job checks the file at once. Each action parses it again: if several actions use the
    events, cache them or write them to Parquet. The events are in one partition.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str or path-like
        See `read_events`.

    Returns
    -------
    pyspark.sql.DataFrame
        The columns that `read_events` returns.

    Raises
    ------
    FileNotFoundError, ValueError
        See `read_events`.

    Examples
    --------
    >>> from helpers.higgs import generate_events
    >>> path = getfixture("tmp_path") / "events.csv.gz"
    >>> generate_events(5, seed=1).to_csv(path, index=False)
    >>> read_events_in_spark(spark, path).select("EventId", "Label").first()
    Row(EventId=100000, Label='b')
    """
    name, size = os.fspath(path), file_size(spark, path)
    if size is None:
        raise _no_file(path)
    if size == 0:  # Spark returns no row for an empty file
        raise ValueError(f"{name} {_EMPTY}")
    content = _content(spark, path)
    verdict = content.mapInPandas(lambda parts: _verdicts(parts, name), _VERDICT).first()
    if verdict.fault:
        raise ValueError(verdict.fault)
    types = [StringType() if column in _TEXTS else spark_type(column) for column in verdict.columns]
    fields = map(StructField, verdict.columns, types)
    return content.mapInPandas(lambda parts: _events(parts, name), StructType(list(fields)))


def _content(spark: SparkSession, path: str | os.PathLike[str]) -> DataFrame:
    """Return a file's content as the only row and column of a table."""
    scheme, _, name = full_path(spark, path).partition(":")
    if scheme == "file" and _UNREADABLE.search(Path(name).name):
        return spark.createDataFrame([(Path(name).read_bytes(),)], _CONTENT)
    files = exact_reader(spark).format("binaryFile").load(exact_path(spark, path))
    return files.select(*_CONTENT.names)


def _events(parts: Iterable[pd.DataFrame], path: str) -> Iterator[pd.DataFrame]:
    """Yield the events in a file's content, on a worker."""
    for part in parts:
        for content in part["content"]:
            yield from _parsed(content, path)


def _verdicts(parts: Iterable[pd.DataFrame], path: str) -> Iterator[pd.DataFrame]:
    """Yield a file's columns, or why it can't be used, on a worker."""
    for part in parts:  # only the partition with the file has any
        columns, fault = None, None
        try:
            for events in _events([part], path):
                columns = list(events.columns)
        except ValueError as error:
            fault = str(error)
        yield pd.DataFrame({"columns": [columns], "fault": [fault]})


def _parsed(content: bytes, path: str) -> Iterator[pd.DataFrame]:
    """Yield the events in a file's content, `_ROWS` at a time."""
    unpackers = (unpack for start, unpack in _COMPRESSION.items() if content.startswith(start))
    try:
        text = next(unpackers, bytes)(content)
        if b"\0" in text:  # where pandas would end a value
            raise _RefusedError(
                "has zero bytes, which a CSV file in UTF-8 doesn't have, so a part of it is "
                "missing or damaged, or it is encoded in another way: write it as UTF-8, or "
                f"download it again from {SOURCE}."
            )
        with io.TextIOWrapper(io.BytesIO(text), "utf-8-sig", newline="") as lines:
            header = next((line for line in lines if line.strip()), None)
            if header is None:
                raise _RefusedError(_EMPTY)
            columns = pd.read_csv(io.StringIO(header)).columns
            layout = _layout_of(columns)
            chunks = pd.read_csv(
                lines, header=None, names=[*columns, *_SURPLUS],
                dtype=dict.fromkeys((*_TEXTS, *_SURPLUS), str), float_precision="round_trip",
                low_memory=False, chunksize=_ROWS,
            )  # fmt: skip
            for chunk in chunks:
                yield _checked(chunk, layout)
    except _RefusedError as error:
        raise ValueError(f"{path} {error}") from None
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path} needs the package {error.name} where it is read, which is on the workers if "
            "Spark reads it: install it there, or unpack the file."
        ) from error
    except Exception as error:  # pandas and the codecs raise errors of many kinds
        reason = str(error).strip().rstrip(".")
        raise ValueError(
            f"{path} can't be read as CSV ({reason}): download it again from {SOURCE}."
        ) from error


def _from_zip(content: bytes) -> bytes:
    """Return the file in a ZIP archive, without what macOS adds to it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = [each for each in archive.infolist() if not each.is_dir()]
        files = [each for each in files if not _OF_MACOS.search(each.filename)]
        if len(files) != 1:
            raise _RefusedError(
                f"is a ZIP archive of {len(files)} files: unpack it, and give the one with the "
                "events."
            )
        return archive.read(files[0])


def _from_zstandard(content: bytes) -> bytes:
    """Return the text of a Zstandard file; its own reader takes an incomplete one without error."""
    import zstandard  # here, because workers that read no such file may lack it

    parts = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(content))
        if not frame.eof:
            raise EOFError("the compressed data has no end")
        content = frame.unused_data
    return b"".join(parts)


# By how a file begins, because its name may lack the suffix, or have one that isn't true.
_COMPRESSION: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _from_zstandard,
    **{bytes([0x50 + n, 0x2A, 0x4D, 0x18]): _from_zstandard for n in range(16)},  # with a note
    b"PK\3\4": _from_zip,
}


class _RefusedError(ValueError):
    """A file can't be used; the message says why, and `_parsed` puts the path in front of it."""


def _checked(events: pd.DataFrame, layout: list[str]) -> pd.DataFrame:
    """Return events with their types and in the published order; refuse invalid values."""
    # pandas takes more surplus values for names of rows.
    if not isinstance(events.index, pd.RangeIndex) or events[_SURPLUS].notna().any(axis=None):
        raise _RefusedError("has rows with more values than columns: remove the surplus.")
    for column in layout:
        if column not in _TEXTS:
            events[column] = _numbers(events[column])
    if LABEL in layout and not events[LABEL].isin(LABELS).all():
        raise _RefusedError(
            f"has values other than s and b in the column {LABEL!r}: write s for signal and b for "
            "background."
        )
    if "KaggleSet" in layout and not events["KaggleSet"].dropna().isin(_SETS).all():
        raise _RefusedError(
            f"has values other than {', '.join(_SETS)} in the column 'KaggleSet', as after a quote "
            f"that isn't closed and swallows lines: download it again from {SOURCE}."
        )
    return events[layout]


def _layout_of(header: pd.Index) -> list[str]:
    """Return the columns of the smallest layout that contains all of `header`."""
    for bookkeeping in _LAYOUTS:
        layout = [EVENT_ID, *FEATURES, *bookkeeping]
        if header.isin(layout).all():
            break
    unknown = [name for name in header if name not in layout]
    if unknown and any(separator in unknown[0] for separator in ";\t"):
        raise _RefusedError(
            "has values that a semicolon or a tab separates: write them with commas, and numbers "
            "with a decimal point."
        )
    if unknown:
        raise _RefusedError(f"has the unknown column {unknown[0]!r}: remove or rename it.")
    missing = [name for name in layout if name not in header]
    if missing:
        raise _RefusedError(
            f"lacks the column {missing[0]!r}: use a file with the columns of {SOURCE}."
        )
    return layout


def _numbers(values: pd.Series) -> pd.Series:
    """Return `values` as int64 or float64, depending on the column."""
    numbers = pd.to_numeric(values, errors="coerce")
    if values.dtype == bool or not np.isfinite(numbers).all():
        remedy = "leave out the rows without a weight"  # a weight can't be missing
        if values.name in INTEGERS:
            remedy = "write a whole number in each row"
        elif values.name in FEATURES:
            remedy = f"write {MISSING} where a value is missing"
        raise _RefusedError(
            f"has values that are not numbers in the column {values.name!r}: {remedy}."
        )
    if values.name not in INTEGERS:
        return numbers.astype("float64")
    if (numbers % 1 != 0).any():
        raise _RefusedError(
            f"has fractions in the column {values.name!r}: write whole numbers there."
        )
    limit = 2**63 if values.name == EVENT_ID else 2**31
    if numbers.dtype == "float64":
        limit = min(limit, 2**53)  # above, a float may be another integer, rounded
    if not ((numbers > -limit) & (numbers < limit)).all():
        raise _RefusedError(
            f"has numbers of {limit} or more in the column {values.name!r}: write smaller ones, "
            "and all without a decimal point."
        )
    return numbers.astype("int64")


def _no_file(path: str | os.PathLike[str]) -> FileNotFoundError:
    return FileNotFoundError(
        f"There is no file {path}: download one from {SOURCE}, or write one with generate_events."
    )
