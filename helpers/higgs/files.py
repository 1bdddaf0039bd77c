"""Read the published event files into pandas or Spark."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
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

# Kaggle's test file, the generator's events, Kaggle's training file, CERN's file.
_LAYOUTS = ((), (LABEL,), ("Weight", LABEL), BOOKKEEPING)


def read_events(path: str | PathLike[str]) -> pd.DataFrame:
    """Read a file of the Higgs boson challenge.

    Parameters
    ----------
    path : str or path-like
        A CSV file, plain or compressed (``.csv.gz``), with the columns of CERN's file (35),
        Kaggle's training file (33), Kaggle's test file (31, no classes) or `generate_events` (32).

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
        If a column is missing, unknown, or contains invalid values.

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
        raise FileNotFoundError(
            f"There is no file {path}: download one from {SOURCE}, or write one with "
            "generate_events."
        )
    try:
        events = pd.read_csv(path)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty: download it again from {SOURCE}.") from error
    layout = _layout_of(events.columns, path)
    for column in (EVENT_ID, *FEATURES):
        events[column] = _numbers(events[column], path)
    if LABEL in layout and not events[LABEL].isin(LABELS).all():
        raise ValueError(
            f"{path} has values other than s and b in the column {LABEL!r}: write s for signal "
            "and b for background."
        )
    return events[layout]


def read_events_in_spark(spark: SparkSession, path: str) -> DataFrame:
    """Read a file of the Higgs boson challenge with Spark, from any file system Spark supports.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str
        See `read_events`.

    Returns
    -------
    pyspark.sql.DataFrame
        The columns that `read_events` returns. An action fails if it uses an invalid value.

    Raises
    ------
    ValueError
        If a column is missing or unknown.

    Examples
    --------
    >>> from helpers.higgs import generate_events
    >>> path = str(getfixture("tmp_path") / "events.csv.gz")
    >>> generate_events(5, seed=1).to_csv(path, index=False)
    >>> read_events_in_spark(spark, path).select("EventId", "Label").first()
    Row(EventId=100000, Label='b')
    """
    header = spark.read.csv(path, header=True).columns
    layout = _layout_of(pd.Index(header), path)
    texts = (LABEL, "KaggleSet")
    types = [StringType() if name in texts else spark_type(name) for name in header]
    schema = StructType([StructField(*column) for column in zip(header, types, strict=True)])
    # Compare each file's header with the schema, because the path may be a folder of several files.
    events = spark.read.csv(
        path, header=True, schema=schema, mode="FAILFAST", enforceSchema=False
    )
    return events.select(*[_checked(name, path).alias(name) for name in layout])


def _checked(name: str, path: str) -> Column:
    """Return a column that fails on values that `read_events` rejects."""
    column = F.col(name)
    if name == LABEL:
        fault, holds = "values other than s and b", column.isin(*LABELS)
    elif name in (EVENT_ID, *FEATURES):
        fault, holds = "values that are no numbers", column.isNotNull() & ~F.isnan(column)
    else:
        return column
    error = F.raise_error(F.lit(f"{path} has {fault} in the column {name!r}."))
    return F.when(holds, column).otherwise(error)


def _layout_of(header: pd.Index, path: str | PathLike[str]) -> list[str]:
    """Return the columns of the smallest layout that contains all of `header`."""
    for bookkeeping in _LAYOUTS:
        layout = [EVENT_ID, *FEATURES, *bookkeeping]
        if header.isin(layout).all():
            break
    unknown = [name for name in header if name not in layout]
    if unknown:
        raise ValueError(f"{path} has the unknown column {unknown[0]!r}: remove or rename it.")
    missing = [name for name in layout if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column {missing[0]!r}: use a file with the columns of {SOURCE}."
        )
    return layout


def _numbers(values: pd.Series, path: str | PathLike[str]) -> pd.Series:
    """Return `values` as int64 or float64, depending on the column."""
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any():
        raise ValueError(
            f"{path} has values that are not numbers in the column {values.name!r}: "
            f"write {MISSING} where a value is missing."
        )
    if values.name not in INTEGERS:
        return numbers.astype("float64")
    if (numbers % 1 != 0).any():
        raise ValueError(
            f"{path} has fractions in the column {values.name!r}: write whole numbers there."
        )
    return numbers.astype("int64")
