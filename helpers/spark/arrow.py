"""Arrow columns in functions and as tables, also with a Spark that has neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pyarrow
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema, to_arrow_type
from pyspark.sql.types import DataType, LongType, StructType

if TYPE_CHECKING:
    import pandas as pd


def arrow_function(
    function: Callable[[pyarrow.Array], pyarrow.Array],
    takes: DataType,
    returns: DataType,
    deterministic: bool = True,
) -> Callable[[Column], Column]:
    """Return a function from a column to a column, which Python computes in Arrow batches.

    Parameters
    ----------
    function : callable
        Returns an array as long as the given one.
    takes, returns : pyspark.sql.types.DataType
        The types of the two columns.
    deterministic : bool
        Whether Spark's optimizer may compute the new column more than once.

    Returns
    -------
    callable
        Spark's ``arrow_udf``, or below Spark 4.1 a ``pandas_udf`` with the same results.

    Examples
    --------
    >>> import pyarrow.compute
    >>> halve = lambda ids: pyarrow.compute.divide(ids, 2)
    >>> half = arrow_function(halve, takes=LongType(), returns=LongType())
    >>> [row[0] for row in spark.range(4).select(half(F.col("id"))).collect()]
    [0, 0, 1, 1]
    """
    if hasattr(F, "arrow_udf"):
        made = F.arrow_udf(function, returns)
        return made if deterministic else made.asNondeterministic()
    arrow_type = to_arrow_type(takes)

    def through_pandas(values):  # without types, which Spark would take literally
        return _to_pandas(function(_to_arrow(values, arrow_type)))

    made = F.pandas_udf(through_pandas, returns)
    made = made if deterministic else made.asNondeterministic()
    return lambda column: made(_exact(column, takes))


def arrow_table(df: DataFrame) -> pyarrow.Table:
    """Return the rows of a DataFrame as an Arrow table.

    Spark 4.0 introduced ``toArrow``, which does the same.

    Examples
    --------
    >>> arrow_table(spark.range(3))["id"].to_pylist()
    [0, 1, 2]
    """
    if hasattr(df, "toArrow"):
        return df.toArrow()
    batches = df._collect_as_arrow()
    schema = batches[0].schema if batches else to_arrow_schema(df.schema)
    return pyarrow.Table.from_batches(batches, schema)


def _exact(column: Column, takes: DataType) -> Column:
    """Return a struct with its integers as text: in pandas they are floats if one is null."""
    if not isinstance(takes, StructType):
        return column
    fields = []
    for field in takes:
        value = column[field.name]
        is_integer = isinstance(field.dataType, LongType)
        fields.append((value.cast("string") if is_integer else value).alias(field.name))
    return F.struct(*fields)


def _to_arrow(values: pd.Series | pd.DataFrame, arrow_type: pyarrow.DataType) -> pyarrow.Array:
    """Return pandas values as Arrow, with the type that they have in Spark."""
    if pyarrow.types.is_struct(arrow_type):
        arrays = [_to_arrow(values[field.name], field.type) for field in arrow_type]
        return pyarrow.StructArray.from_arrays(arrays, fields=list(arrow_type))
    if pyarrow.types.is_integer(arrow_type):
        return pyarrow.array(values.tolist()).cast(arrow_type)
    return pyarrow.array(values.tolist(), arrow_type)


def _to_pandas(array: pyarrow.Array) -> pd.Series | pd.DataFrame:
    """Return an Arrow array as pandas values; integers stay integers where one is null."""
    import pandas as pd

    if isinstance(array, pyarrow.StructArray):
        fields = zip(array.type, array.flatten(), strict=True)
        return pd.DataFrame({field.name: _to_pandas(values) for field, values in fields})
    return array.to_pandas(types_mapper={pyarrow.int64(): pd.Int64Dtype()}.get)
