"""What a good record is, and the way from a record's bytes to an event.

A good record is

- one JSON object in UTF-8, as RFC 8259 defines it: no NaN, no Infinity, nothing after the object;
- with each of its names once, and no number beyond the range of 64-bit floats;
- with ``EventId`` as an integer of 64 bits (100000, not 100000.0 or "100000");
- with each of the 30 features as a number that a network can take, within the range of 32-bit
  floats; where the schema has an integer (``PRI_jet_num``), it is whole and fits (2 or 2.0, not
  2.5).

Other fields are ignored. Whatever else arrives is a bad record: it is not scored, and it does not
stop the stream. `parse_events` gives the reason for each, and `keep_bad_records` keeps it with its
place in Kafka. `json_to_dataframe_row`, which parses one record, refuses the same ones.

For events of your own, give another schema: its first column is the integer that identifies an
event, the others are its features.
"""

from __future__ import annotations

import functools
import json
import operator
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow
from pyspark.ml.functions import vector_to_array
from pyspark.sql import Column, DataFrame, Observation, Row
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DoubleType, LongType, StringType, StructField, StructType

from helpers.higgs import SCHEMA

# How long Spark may take to hand over an action's counts. They are there by then, or never.
COUNTS_SECONDS = 10

MODEL_VERSION = "model_version"  # the column that says which serving model scored an event

_DENSE = 1  # how VectorUDT marks a dense vector
_NUMBERS = frozenset((int, float))  # not bool, which Python holds for an int
_LARGEST = float(np.finfo("float32").max)
_INTEGER_BITS = {"byte": 8, "short": 16, "integer": 32, "long": 64}
_QUOTED = 40  # characters of a bad record that its reason quotes
# How many names of unused fields an Arrow batch reports, and how much of each: they come from
# outside, and go to the driver.
_NAMES_TOLD = 20
_NAME_LENGTH = 100


class BadRecordError(ValueError):
    """The record is no event; the message is the reason."""


def json_to_dataframe_row(text: str | bytes, schema: StructType = SCHEMA) -> Row:
    """Return the event of one record as a row, its columns in the schema's order.

    Before Spark 3, ``Row(**event)`` sorted the columns by name; here the schema decides.

    Parameters
    ----------
    text : str or bytes
        The record's value.
    schema : pyspark.sql.types.StructType
        The id of an event, and its features.

    Returns
    -------
    pyspark.sql.Row
        Integers where the schema has integers, otherwise floats.

    Raises
    ------
    BadRecordError
        If it is no good record, as this module's text defines it.

    Examples
    --------
    >>> json_to_dataframe_row('{"EventId": 100000}')
    Traceback (most recent call last):
    ...
    helpers.records.BadRecordError: DER_mass_MMC is missing
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    # Writing a schema as JSON takes longer than reading an event.
    parser = _higgs_parser() if schema is SCHEMA else _parser(schema.json())
    return parser.row(content)


def parse_events(records: DataFrame, schema: StructType = SCHEMA) -> DataFrame:
    """Add the column `event`: what each Kafka record holds, or why it is a bad one.

    The event stays one column until it is scored, so that parsing, scaling and the network run in
    one pass through Python: fields that are taken out of it before would go back to Java first.

    Parameters
    ----------
    records : pyspark.sql.DataFrame
        Has the binary column ``value``, as Spark's Kafka source does.
    schema : pyspark.sql.types.StructType
        The id of an event, and its features.

    Returns
    -------
    pyspark.sql.DataFrame
        With ``event``, a struct of the id, of ``features`` (an array of floats in the schema's
        order), of ``reason`` (null for a good record; otherwise the id and the features are null),
        and of ``unused``, names that the record has and the schema doesn't. To be short, each Arrow
        batch tells a name once, up to 100 characters of it, and no more than 20 names. The column's
        metadata names the features.

    Examples
    --------
    >>> records = spark.createDataFrame([(b"{}",), (b"[1]",)], "value binary")
    >>> [row.reason for row in parse_events(records).select("event.reason").collect()]
    ['EventId is missing', 'it is an array, not a JSON object']
    """
    schema_json = schema.json()
    parse = F.arrow_udf(
        lambda values: _parser(schema_json).events(values), event_type(schema)
    )
    event = parse(F.col("value").cast("binary"))
    return records.withColumn("event", event.alias("event", metadata=_metadata(schema)))


def rows_to_events(rows: DataFrame, schema: StructType = SCHEMA) -> DataFrame:
    """Return rows of `json_to_dataframe_row` as the column `event` that `parse_events` makes.

    Parameters
    ----------
    rows : pyspark.sql.DataFrame
        Has the schema's columns.
    schema : pyspark.sql.types.StructType
        The id of an event, and its features.

    Examples
    --------
    >>> from helpers.higgs import generate_events
    >>> rows = spark.createDataFrame(generate_events(1, seed=0)[list(SCHEMA.names)], SCHEMA)
    >>> rows_to_events(rows).first().event.EventId
    100000
    """
    event_id, *features = schema.names
    numbers = [F.col(name).cast("double") for name in features]
    fields = [F.col(event_id), F.array(*numbers).alias("features")]
    fields += [F.lit(None).alias("reason"), F.lit(None).alias("unused")]
    event = F.struct(*fields).cast(event_type(schema))
    return rows.select(event.alias("event", metadata=_metadata(schema)))


def to_columns(records: DataFrame, schema: StructType = SCHEMA) -> DataFrame:
    """Return the events of Kafka records as a table: a column for the id and for each feature.

    Parameters
    ----------
    records : pyspark.sql.DataFrame
        Has the binary column ``value``.
    schema : pyspark.sql.types.StructType
        The id of an event, and its features.

    Returns
    -------
    pyspark.sql.DataFrame
        The schema's columns. A bad record is a row of nulls.

    Examples
    --------
    >>> to_columns(spark.createDataFrame([(b"{}",)], "value binary")).first().EventId is None
    True
    """
    event_id, *features = schema.fields
    name = event_id.name
    columns = [F.col(f"event.{name}").cast(event_id.dataType).alias(name)]
    for index, field in enumerate(features):
        value = F.col("event.features")[index]
        columns.append(value.cast(field.dataType).alias(field.name))
    return parse_events(records, schema).select(*columns)


def keep_bad_records(scored: DataFrame, event_col: str = "event") -> DataFrame:
    """Return scored records with the columns that a sink takes.

    Parameters
    ----------
    scored : pyspark.sql.DataFrame
        Has the columns of Spark's Kafka source, and one of events as `parse_events` makes it and
        `helpers.transformers.ModelPredictor` leaves it.
    event_col : str
        The column of events.

    Returns
    -------
    pyspark.sql.DataFrame
        Instead of the column of events its id, and

        - ``topic``, ``partition``, ``offset``, ``timestamp``: the record's place and time in Kafka;
        - ``bad``: null for a good record, otherwise a struct of ``key``, ``value``, ``reason``;
        - ``unused``: names of fields that the record has and the schema doesn't, or null.

        All other columns stay, such as the prediction.

    Examples
    --------
    >>> stored = [b"{}", "events", 0, 7, None, None, (None, "EventId is missing", None)]
    >>> columns = "value binary, topic string, partition int, offset long, timestamp timestamp, "
    >>> columns += "key binary, event struct<EventId: long, reason: string, unused: array<string>>"
    >>> bad = keep_bad_records(spark.createDataFrame([stored], columns)).first()
    >>> bad.offset, bad.EventId, bad.bad.reason
    (7, None, 'EventId is missing')
    """
    event_id = scored.schema[event_col].dataType.names[0]
    event = F.col(event_col)
    content = F.struct("key", "value", event["reason"].alias("reason"))
    bad = F.when(event["reason"].isNotNull(), content)
    replaced = (event_col, "key", "value", "timestampType")
    others = [name for name in scored.columns if name not in replaced]
    return scored.select(
        event[event_id].alias(event_id), *others, bad.alias("bad"), event["unused"].alias("unused")
    )


def observed(counts: Observation) -> dict[str, Any] | None:
    """Return what an action has counted; None if it hasn't, for `get` alone would wait for ever.

    Parameters
    ----------
    counts : pyspark.sql.Observation
        What was given to `observe` of a DataFrame.

    Examples
    --------
    >>> counts = Observation()
    >>> observe = spark.range(3).observe(counts, F.count("id").alias("events"))
    >>> observe.write.format("noop").mode("overwrite").save()
    >>> observed(counts)
    {'events': 3}
    """
    deadline = time.monotonic() + COUNTS_SECONDS
    while not counts._jo.future().isCompleted():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return counts.get


def event_type(schema: StructType = SCHEMA) -> StructType:
    """Return the type of the column `event`.

    Examples
    --------
    >>> event_type().names
    ['EventId', 'features', 'reason', 'unused']
    """
    fields = [
        StructField(schema.names[0], LongType()),
        StructField("features", ArrayType(DoubleType())),
        StructField("reason", StringType()),
        StructField("unused", ArrayType(StringType())),
    ]
    return StructType(fields)


def list_array(rows: np.ndarray, missing: np.ndarray) -> pyarrow.ListArray:
    """Return the rows of a matrix as an Arrow array of lists.

    Parameters
    ----------
    rows : numpy.ndarray
        Shape (rows that are there, width).
    missing : numpy.ndarray
        Shape (all rows), bool: which rows are null in the result.

    Examples
    --------
    >>> list_array(np.array([[1.0, 2.0]]), np.array([True, False])).to_pylist()
    [None, [1.0, 2.0]]
    """
    ends = np.cumsum(~missing, dtype="int32") * rows.shape[1]
    offsets = pyarrow.array(np.concatenate([[0], ends]).astype("int32"))
    mask = pyarrow.array(missing) if missing.any() else None
    return pyarrow.ListArray.from_arrays(offsets, np.ascontiguousarray(rows).ravel(), mask=mask)


def matrix_of(lists: pyarrow.ListArray, width: int) -> np.ndarray:
    """Return the lists that are not null as the rows of a matrix.

    Parameters
    ----------
    lists : pyarrow.ListArray
        Lists of numbers.
    width : int
        How many numbers each must have.

    Returns
    -------
    numpy.ndarray
        Shape (lists that are not null, width).

    Raises
    ------
    ValueError
        If a list has another length.

    Examples
    --------
    >>> matrix_of(pyarrow.array([None, [1.0, 2.0]]), width=2)
    array([[1., 2.]])
    """
    lengths = lists.drop_null().value_lengths().to_numpy()
    if (lengths != width).any():
        wrong = lengths[lengths != width][0]
        raise ValueError(f"the model takes {width} features, but a row has {wrong}.")
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def vector_entries(vector: Column) -> Column:
    """Return a vector column as an array column, null where the vector is null.

    The entries of a dense vector are at hand; Spark's `vector_to_array` would put each into an
    object, and refuses null.

    Parameters
    ----------
    vector : pyspark.sql.Column
        A column of vectors.

    Examples
    --------
    >>> df = spark.createDataFrame([(Vectors.dense([0.5, 2.0]),)], ["features"])
    >>> df.select(vector_entries(df.features).alias("entries")).first().entries
    [0.5, 2.0]
    """
    dense = F.unwrap_udt(vector)
    is_dense = dense["type"] == _DENSE
    sparse = vector.isNotNull()
    return F.when(is_dense, dense["values"]).when(sparse, vector_to_array(vector))


def printable(text: str) -> str:
    r"""Return a text that came from outside as a log or a page may show it, on one line.

    Parameters
    ----------
    text : str
        Whatever a record has: control characters, line breaks, marks that turn the direction of
        writing, and halves of characters are escaped.

    Examples
    --------
    >>> printable("mass\x1b[2J\u202e")
    'mass\\x1b[2J\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _metadata(schema: StructType) -> dict[str, list[str]]:
    """Return what a column of events says of itself: the names of its features, in their order."""
    return {"features": schema.names[1:]}


class _Event(NamedTuple):
    """A good record's content: the id and the features in order, and the names without use."""

    numbers: Sequence[float]
    unused: list[str]


class _Parser:
    """Parses the records of one schema; what is good is decided in `event`."""

    def __init__(self, schema: StructType) -> None:
        self._names = schema.names
        bits = [_INTEGER_BITS.get(field.dataType.typeName()) for field in schema]
        self._bits = dict(zip(schema.names, bits, strict=True))
        self._whole_numbers = [(i, b) for i, b in enumerate(bits) if b]
        self._row = Row(*schema.names)
        self._numbers_of = operator.itemgetter(*schema.names)
        # The id as an integer, for a float has only 53 bits for it; the features as floats.
        self._packed = struct.Struct(f"<q{len(schema.names) - 1}d")

    def row(self, value: bytes) -> Row:
        """Return a record's event as a row; raises `BadRecordError`."""
        numbers = self.event(value).numbers
        kinds = [int if bits else float for bits in self._bits.values()]
        return self._row(*(kind(number) for kind, number in zip(kinds, numbers, strict=True)))

    def event(self, value: bytes | None) -> _Event:
        """Return a record's event; raises `BadRecordError` with the first reason that is found."""
        event = _json_object(value)
        for name in self._names:
            if name not in event:
                raise BadRecordError(f"{name} is missing")
            if type(event[name]) not in _NUMBERS:
                raise BadRecordError(f"{name} is {_quoted(event[name])}, not a number")
            if self._bits[name] and not _is_whole(event[name], self._bits[name]):
                raise BadRecordError(
                    f"{name} is {event[name]}, not an integer of {self._bits[name]} bits"
                )
        event_id = event[self._names[0]]
        if type(event_id) is not int:
            raise BadRecordError(f"{self._names[0]} is {event_id}, not an integer")
        for name in self._names[1:]:
            if abs(event[name]) > _LARGEST:
                raise BadRecordError(f"{name} is {event[name]}, too large for a 32-bit float")
        return _Event(self._numbers_of(event), sorted(event.keys() - self._bits.keys()))

    def events(self, values: pyarrow.BinaryArray) -> pyarrow.StructArray:
        """Return the events of an Arrow batch, as `parse_events` describes them."""
        size, pack_into = self._packed.size, self._packed.pack_into
        table = bytearray(size * len(values))
        reasons: list[str | None] = [None] * len(values)
        unused: list[list[str] | None] = [None] * len(values)
        told: set[str] = set()
        for index, value in enumerate(values.to_pylist()):
            numbers = self._numbers_at_a_glance(value)
            if numbers is None:
                try:
                    numbers, surplus = self.event(value)
                except BadRecordError as error:
                    reasons[index] = str(error)
                    continue
                names = dict.fromkeys(name[:_NAME_LENGTH] for name in surplus)
                new = [name for name in names if name not in told][: _NAMES_TOLD - len(told)]
                unused[index] = [printable(name) for name in new] or None
                told.update(new)
            pack_into(table, index * size, *numbers)
        return self._as_arrow(table, reasons, unused, values)

    def _reason(self, value: bytes) -> str | None:
        """Return why a record is bad; None if it is good."""
        try:
            self.event(value)
        except BadRecordError as error:
            return str(error)
        return None

    def _numbers_at_a_glance(self, value: bytes | None) -> Sequence[float] | None:
        """Return a record's numbers where it is surely good, otherwise None: `event` decides then.

        Where all fields are numbers, text is only in the names; and where there are as many colons
        as fields, no name comes twice.
        """
        try:
            event = orjson.loads(value)
            numbers = self._numbers_of(event)
            if len(event) != len(numbers) or value.count(b":") != len(numbers):
                return None
        except (ValueError, KeyError, TypeError):
            return None
        if not _NUMBERS.issuperset(map(type, numbers)) or type(numbers[0]) is not int:
            return None
        for index, bits in self._whole_numbers:
            if not _is_whole(numbers[index], bits):
                return None
        return numbers

    def _as_arrow(
        self,
        table: bytearray,
        reasons: list[str | None],
        unused: list[list[str] | None],
        values: pyarrow.BinaryArray,
    ) -> pyarrow.StructArray:
        """Return a packed table of ids and features, with its reasons, as an array of structs."""
        ids = np.frombuffer(table, dtype="<i8").reshape(len(reasons), -1)[:, 0]
        features = np.frombuffer(table, dtype="<f8").reshape(len(reasons), -1)[:, 1:]
        # All events at once, for a look at each number of each event would take as long as parsing.
        for index in np.flatnonzero((np.abs(features) > _LARGEST).any(axis=1)):
            reasons[index] = self._reason(values[index].as_py())
        bad = np.array([reason is not None for reason in reasons], dtype=bool)
        arrays = [
            pyarrow.array(ids, mask=bad),
            list_array(features[~bad], bad),
            pyarrow.array(reasons, pyarrow.string()),
            pyarrow.array(unused, pyarrow.list_(pyarrow.string())),
        ]
        return pyarrow.StructArray.from_arrays(arrays, [self._names[0], *event_type().names[1:]])


@functools.cache
def _higgs_parser() -> _Parser:
    return _Parser(SCHEMA)


@functools.lru_cache(maxsize=8)
def _parser(schema_json: str) -> _Parser:
    """Return the parser of a schema; there is one, for making it takes longer than an event."""
    return _Parser(StructType.fromJson(json.loads(schema_json)))


def _json_object(value: bytes | None) -> Mapping[str, Any]:
    """Return the JSON object that a record's bytes are; raises `BadRecordError`."""
    if value is None:
        raise BadRecordError("it has no value (a tombstone)")
    try:
        event = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise BadRecordError(f"it is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise BadRecordError(f"it is {_quoted(event)}, not a JSON object")
    if value.count(b":") != len(event):
        _check_names_differ(value)
    return event


def _check_names_differ(value: bytes) -> None:
    """Raise `BadRecordError` where an object has a name twice, of which orjson takes the last."""
    try:
        pairs = json.loads(value.decode(), object_pairs_hook=list, parse_int=str, parse_float=str)
    except RecursionError:
        raise BadRecordError("it is nested too deeply") from None
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise BadRecordError(f"{_quoted(name)} comes twice")
        seen.add(name)


def _is_whole(number: float, bits: int) -> bool:
    """Tell whether a number is whole and fits an integer of so many bits."""
    limit = 2 ** (bits - 1)
    return number % 1 == 0 and -limit <= number < limit


def _quoted(value: object) -> str:
    """Return a JSON value as a short text."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = printable(orjson.dumps(value).decode())
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
