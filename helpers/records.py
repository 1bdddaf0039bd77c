"""From the JSON of a record to columns: one event a time in Python, or whole batches in Spark."""

from __future__ import annotations

import orjson
from pyspark.sql import DataFrame, Row, functions

from helpers.higgs import EVENT_ID, SCHEMA


def json_to_dataframe_row(text: str) -> Row:
    """Return an event's JSON object as a row, its columns in the schema's order.

    Before Spark 3, ``Row(**event)`` sorted the columns by name; here the schema decides.

    Parameters
    ----------
    text : str
        A JSON object with EventId and the 30 features. What else it has is left out.

    Returns
    -------
    pyspark.sql.Row
        EventId and PRI_jet_num as int, the other features as float.

    Raises
    ------
    ValueError
        If the text is no JSON object, or a column is missing.

    Examples
    --------
    >>> json_to_dataframe_row('{"EventId": 100000}')
    Traceback (most recent call last):
    ...
    ValueError: the record has no 'DER_mass_MMC': it must be a JSON object with EventId and the 30
    features.
    """
    event = orjson.loads(text)
    try:
        return _ROW(*(kind(event[name]) for name, kind in _COLUMNS))
    except (KeyError, TypeError) as error:
        missing = error if isinstance(error, KeyError) else f"columns ({error})"
        raise ValueError(
            f"the record has no {missing}: it must be a JSON object with {EVENT_ID} and the "
            f"{len(_COLUMNS) - 1} features."
        ) from None


def to_columns(records: DataFrame) -> DataFrame:
    """Return the events of Kafka records as columns: `json_to_dataframe_row` for whole batches.

    Parameters
    ----------
    records : pyspark.sql.DataFrame
        Has the column ``value`` with JSON objects, as bytes or text.

    Returns
    -------
    pyspark.sql.DataFrame
        EventId and the 30 features, in the schema's order. A record that is no JSON object is a row
        of nulls, and a feature that a record doesn't have is null.

    Examples
    --------
    >>> to_columns(spark.createDataFrame([('{"EventId": 100000}',)], ["value"])).first().EventId
    100000
    """
    event = functions.from_json(functions.col("value").cast("string"), SCHEMA)
    return records.select(event.alias("event")).select("event.*")


# Spark's types by Python's, so that an integer in the JSON is a float where the schema wants one.
_COLUMNS = [
    (field.name, int if field.dataType.typeName() in ("integer", "long") else float)
    for field in SCHEMA
]
_ROW = Row(*(name for name, _ in _COLUMNS))
