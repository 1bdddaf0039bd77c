"""Parse the bytes of Kafka records into events, and report bad records.

A good record

- is one JSON object in UTF-8, as in RFC 8259: no NaN, no Infinity, nothing after the object;
- has no duplicate names, and no number beyond the range of 64-bit floats;
- has ``EventId`` as a 64-bit integer (100000, not 100000.0 or "100000");
- has each of the 30 features as a number within the range of 32-bit floats; where the schema has an
  integer (``PRI_jet_num``), the number is whole and fits (2 or 2.0, not 2.5). A feature of 64-bit
  integers must be strictly between -2**53 and 2**53, because features are passed on as 64-bit
  floats, which can't represent all larger integers;
- has no lone surrogate in a text, and nothing nested deeper than 100 levels.

Numbers are read as 64-bit floats, so 1e-400 is 0. Other fields are ignored. Every other record is
bad: it is not scored, and does not stop the stream. A record for which the network returns no
finite prediction is also bad. `parse_events` and then `helpers.transformers.ModelPredictor` give
the reason, and `keep_bad_records` keeps the record with its topic, partition and offset.
`json_to_dataframe_row` parses a single record and rejects the same records as `parse_events`.

For your own events, pass another schema: the first column is the integer that identifies an event,
the others are its features, all of them numbers. `check_schema` rejects unusable schemas.
"""

from __future__ import annotations

import functools
import json
import operator
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import orjson
import pyarrow
from pyspark import SparkContext
from pyspark.ml.functions import vector_to_array
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DoubleType,
    LongType,
    StringType,
    StructField,
    StructType,
)

from helpers.higgs import SCHEMA
from helpers.spark import arrow_function

MODEL_VERSION = "model_version"  # the column with the version of the model that scored an event
# In a column's metadata: whether its predictions are probabilities, as far as a model was tried.
ARE_PROBABILITIES = "probabilities"

# The columns that scoring adds to a table of features.
_RESULTS = ("prediction", "predicted_index", MODEL_VERSION)
# All columns that occur next to an event's id: those of Kafka's source, of the column `event`, and
# of a sink's files.
_BESIDE_THE_ID = frozenset((
    "key", "value", "headers", "topic", "partition", "offset", "timestamp", "timestamptype",
    "event", "features", "reason", "unused", *_RESULTS, "probability_0", "probability_1",
    "event_time", "batch", "bad", "bounds", "outside",
))  # fmt: skip

_HIGGS_JSON = SCHEMA.json()
_DENSE = 1  # how VectorUDT marks a dense vector
_NUMBERS = frozenset((int, float))  # not bool, which Python treats as an int
LARGEST = float(np.nextafter(2.0**128 - 2.0**103, 0))  # finite as a 32-bit float, as is no larger
_INTEGER_BITS = {"byte": 8, "short": 16, "integer": 32, "long": 64}
_FLOATS = ("float", "double")
EXACT = 2**53  # below this integer, each number has a 64-bit float of its own
_DEEPEST = 100  # levels of nesting; what Python can read depends on who calls it
_QUOTED = 40  # maximum number of characters that a reason quotes from a bad record
# Limits on the number and length of the unused field names that an Arrow batch reports to the
# driver, because they come from outside.
_NAMES_REPORTED = 20
_NAME_LENGTH = 100


class BadRecordError(ValueError):
    """The record is not an event; the message is the reason."""


def check_schema(schema: StructType) -> None:
    """Raise `ValueError` if a schema can't be used.

    Parameters
    ----------
    schema : pyspark.sql.types.StructType
        The event's id, an integer, then its features: integers, floats or doubles. Their names may
        have any characters, but must differ by more than case, because Spark ignores case.

    Examples
    --------
    >>> check_schema(StructType().add("reading", LongType()).add("mass", StringType()))
    Traceback (most recent call last):
    ...
    ValueError: this schema can't be used: the feature 'mass' is a string, not a number: leave it
    out, or send it as a number.
    """
    if not isinstance(schema, StructType) or len(schema) < 2:
        raise ValueError(
            "a schema must be a StructType of the event's id and at least one feature, such as "
            'StructType().add("reading", LongType()).add("temperature", DoubleType()).'
        )
    event_id, *features = schema.fields
    faults = [
        f"the feature {field.name!r} is a {field.dataType.simpleString()}, not a number: leave it "
        "out, or send it as a number"
        for field in features
        if field.dataType.typeName() not in (*_INTEGER_BITS, *_FLOATS)
    ]
    if event_id.dataType.typeName() not in _INTEGER_BITS:
        faults.append(
            f"its first field, the id {event_id.name!r}, is a {event_id.dataType.simpleString()}: "
            "begin with a field that is an integer, such as LongType()"
        )
    faults += name_faults(event_id.name, schema.names[1:])
    if faults:
        raise ValueError(f"this schema can't be used: {'; '.join(faults)}.")


def name_faults(event_id: str, features: Sequence[str]) -> list[str]:
    """Return the faults in the names of an event's fields, as clauses; an empty list if none.

    Names that differ only by case are duplicates, because Spark ignores case by default.

    Examples
    --------
    >>> name_faults("reading", ["mass", "Mass", "prediction"])
    ['features are named twice: Mass, mass',
     "the feature 'prediction' has the name of a column of the results: rename it"]
    """
    if not all(isinstance(name, str) and name for name in (event_id, *features)):
        return ["a field has no name"]
    folded = Counter(name.lower() for name in features)
    repeated = {name for name in features if folded[name.lower()] > 1}
    faults = [f"features are named twice: {', '.join(sorted(repeated))}"] if repeated else []
    if event_id.lower() in folded:
        faults.append(f"the id {event_id!r} is also a feature")
    if event_id.lower() in _BESIDE_THE_ID:
        faults.append(
            f"the id {event_id!r} has the name of a column of Kafka or of the results: rename it, "
            f"such as to {event_id + '_id'!r}"
        )
    return faults + [
        f"the feature {name!r} has the name of a column of the results: rename it"
        for name in features
        if name.lower() in _RESULTS
    ]


def named(name: str) -> Column:
    """Return the column with exactly this name, whatever characters the name has.

    In `pyspark.sql.functions.col`, a dot selects a field of a struct.

    Examples
    --------
    >>> spark.createDataFrame([(7,)], ["a.b`c"]).select(named("a.b`c")).first()[0]
    7
    """
    escaped = name.replace("`", "``")
    return F.col(f"`{escaped}`")


def json_to_dataframe_row(text: str | bytes, schema: StructType = SCHEMA) -> Row:
    """Return the event in a record as a row, with its columns in the schema's order.

    Before Spark 3, ``Row(**event)`` sorted the columns by name; here the schema sets the order.

    Parameters
    ----------
    text : str or bytes
        The record's value.
    schema : pyspark.sql.types.StructType
        The event's id, then its features; see `check_schema`.

    Returns
    -------
    pyspark.sql.Row
        Integers where the schema has integers, floats elsewhere: the numbers of `to_columns`.

    Raises
    ------
    BadRecordError
        If the record is bad, as defined at the top of this module.

    Examples
    --------
    >>> json_to_dataframe_row('{"EventId": 100000}')
    Traceback (most recent call last):
    ...
    helpers.records.BadRecordError: DER_mass_MMC is missing
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    # Serializing a schema to JSON takes longer than parsing an event.
    return _parser(_HIGGS_JSON if schema is SCHEMA else schema.json()).row(content)


def parse_events(records: DataFrame, schema: StructType = SCHEMA) -> DataFrame:
    """Add the column `event`: the event in each Kafka record, or the reason why it is bad.

    The event stays a single column until it is scored, so that parsing, scaling and the network run
    in one pass through Python. Extracting fields earlier would send them back to Java first.

    Parameters
    ----------
    records : pyspark.sql.DataFrame
        Records with the binary column ``value``, as Spark's Kafka source returns them.
    schema : pyspark.sql.types.StructType
        The event's id, then its features; see `check_schema`.

    Returns
    -------
    pyspark.sql.DataFrame
        The records with ``event``, a struct of the id; ``features`` (an array of floats in the
        schema's order); ``reason`` (null for a good record; otherwise the id and the features are
        null); and ``unused``, the names of fields that are not in the schema. Each Arrow batch
        reports a name only once, truncated to 100 characters, and no more than 20 names. The
        column's metadata names the features.

    Examples
    --------
    >>> records = spark.createDataFrame([(b"{}",), (b"[1]",)], "value binary")
    >>> [row.reason for row in parse_events(records).select("event.reason").collect()]
    ['EventId is missing', 'it is an array, not a JSON object']
    """
    check_schema(schema)
    event = _event_column(records.sparkSession.sparkContext, schema.json())
    return records.withColumn("event", event)


@functools.lru_cache(maxsize=8)
def _event_column(context: SparkContext, schema_json: str) -> Column:
    """Return the column `event`, cached per context because pickling its function takes 5 ms."""
    schema = StructType.fromJson(json.loads(schema_json))
    parse = arrow_function(
        lambda values: _parser(schema_json).events(values), BinaryType(), event_type(schema)
    )
    event = parse(F.col("value").cast("binary"))
    return event.alias("event", metadata={"features": schema.names[1:]})


def to_columns(records: DataFrame, schema: StructType = SCHEMA) -> DataFrame:
    """Return the events in Kafka records as a table with a column per feature, and the id.

    Parameters
    ----------
    records : pyspark.sql.DataFrame
        Records with the binary column ``value``.
    schema : pyspark.sql.types.StructType
        The event's id, then its features.

    Returns
    -------
    pyspark.sql.DataFrame
        The schema's columns. A bad record becomes a row of nulls.

    Examples
    --------
    >>> to_columns(spark.createDataFrame([(b"{}",)], "value binary")).first().EventId is None
    True
    """
    events = parse_events(records, schema)
    event_id, *features = schema.fields
    columns = [F.col("event")[event_id.name].cast(event_id.dataType).alias(event_id.name)]
    for index, field in enumerate(features):
        value = F.col("event.features")[index]
        columns.append(value.cast(field.dataType).alias(field.name))
    return events.select(*columns)


def keep_bad_records(scored: DataFrame) -> DataFrame:
    """Return scored records with the columns that a sink expects.

    Parameters
    ----------
    scored : pyspark.sql.DataFrame
        Records with the columns of Spark's Kafka source, and the column ``event`` as returned by
        `parse_events` and then `helpers.transformers.ModelPredictor`.

    Returns
    -------
    pyspark.sql.DataFrame
        ``event`` is replaced by the event's id and

        - ``topic``, ``partition``, ``offset``, ``timestamp`` of the record in Kafka;
        - ``bad``: null for a good record, otherwise a struct of ``key``, ``value`` and ``reason``;
        - ``unused``: names of fields that are not in the schema, or null.

        All other columns, such as the prediction, are kept.

    Examples
    --------
    >>> stored = [b"{}", "events", 0, 7, None, None, (None, "EventId is missing", None)]
    >>> columns = "value binary, topic string, partition int, offset long, timestamp timestamp, "
    >>> columns += "key binary, event struct<EventId: long, reason: string, unused: array<string>>"
    >>> bad = keep_bad_records(spark.createDataFrame([stored], columns)).first()
    >>> bad.offset, bad.EventId, bad.bad.reason
    (7, None, 'EventId is missing')
    """
    event_id, event = scored.schema["event"].dataType.names[0], F.col("event")
    content = F.struct("key", "value", event["reason"].alias("reason"))
    bad = F.when(event["reason"].isNotNull(), content)
    replaced = ("event", "key", "value", "timestampType")
    others = [named(name) for name in scored.columns if name not in replaced]
    return scored.select(
        event[event_id].alias(event_id), *others, bad.alias("bad"), event["unused"].alias("unused")
    )


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
        Shape (rows that are not null, width).
    missing : numpy.ndarray
        Shape (all rows,), bool: which rows are null in the result.

    Examples
    --------
    >>> list_array(np.array([[1.0, 2.0]]), np.array([True, False])).to_pylist()
    [None, [1.0, 2.0]]
    """
    ends = np.cumsum(~missing, dtype="int32") * rows.shape[1]
    offsets = pyarrow.array(np.concatenate([[0], ends]).astype("int32"))
    mask = pyarrow.array(missing) if missing.any() else None
    return pyarrow.ListArray.from_arrays(offsets, np.ascontiguousarray(rows).ravel(), mask=mask)


def vector_entries(vector: Column) -> Column:
    """Return a vector column as an array column, null where the vector is null.

    The entries of a dense vector are read directly. Spark's `vector_to_array` would box each of
    them, and fails on null.

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
    r"""Return text from outside on one line, safe to show in a log or on a page.

    Parameters
    ----------
    text : str
        Any text. Control characters, line breaks, bidirectional control characters and lone
        surrogates are escaped.

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


class _Integers(NamedTuple):
    """The range of integers that a field accepts."""

    lowest: int
    highest: int
    words: str

    def include(self, number: float) -> bool:
        """Return whether a number is one of these integers."""
        return number % 1 == 0 and self.lowest <= number <= self.highest


def _integers(field: StructField, is_id: bool) -> _Integers | None:
    """Return the integers that a field accepts; None if it also accepts fractions."""
    bits = _INTEGER_BITS.get(field.dataType.typeName())
    if bits is None:
        return None
    if bits == 64 and not is_id:
        return _Integers(1 - EXACT, EXACT - 1, "strictly between -2**53 and 2**53")
    return _Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, f"of {bits} bits")


def _kind(field: StructField) -> Callable[[float], float]:
    """Return the function that converts a number to a field's type."""
    if field.dataType.typeName() == "float":
        return lambda number: float(np.float32(number))
    return int if field.dataType.typeName() in _INTEGER_BITS else float


def _decoder(schema: StructType) -> msgspec.json.Decoder | None:
    """Return a decoder of objects that have exactly a schema's fields, all of them numbers.

    It takes 3.2 microseconds per event, with all checks. orjson takes 6.0, on the same core.
    None if a name has a quotation mark, a backslash or a control character, as msgspec allows none.
    """
    features = schema.fields[1:]
    # A float can't represent all 64-bit integers, so these stay integers until they are checked.
    kinds = [int | float if field.dataType.typeName() == "long" else float for field in features]
    names = {f"field_{place}": name for place, name in enumerate(schema.names)}
    fields = list(zip(names, [int, *kinds], strict=True))
    try:
        event = msgspec.defstruct("Event", fields, rename=names, forbid_unknown_fields=True)
    except ValueError:
        return None
    return msgspec.json.Decoder(event)


class _Parser:
    """Parses the records of one schema; `event` decides which are good.

    For another reason to reject a record, extend `event`, and let `_fast_numbers` return None for
    such records, so that `event` sees them.
    """

    def __init__(self, schema: StructType) -> None:
        self._names = schema.names
        integers = [_integers(field, is_id=not place) for place, field in enumerate(schema)]
        self._integers = dict(zip(schema.names, integers, strict=True))
        self._narrow = [place for place, field in enumerate(schema.fields[1:])
                        if field.dataType.typeName() == "float"]  # fmt: skip
        self._whole_numbers = [(place, kind) for place, kind in enumerate(integers) if kind]
        self._kinds = [_kind(field) for field in schema]
        self._row = Row(*schema.names)
        self._numbers_of = operator.itemgetter(*schema.names)
        # The id is an integer, because a float has only 53 bits for it; the features are floats.
        self._packed = struct.Struct(f"<q{len(schema.names) - 1}d")
        self._decoder = _decoder(schema)

    def row(self, value: bytes) -> Row:
        """Return a record's event as a row, or raise `BadRecordError`."""
        numbers, _ = self.event(value)
        return self._row(*(kind(n) for kind, n in zip(self._kinds, numbers, strict=True)))

    def event(self, value: bytes | None) -> tuple[Sequence[float], list[str]]:
        """Return a record's id and features in order, and the names of its unused fields.

        Raises `BadRecordError` with the first reason found if the record is bad.
        """
        event = _json_object(value)
        for name in self._names:
            if name not in event:
                raise BadRecordError(f"{name} is missing")
            if type(event[name]) not in _NUMBERS:
                raise BadRecordError(f"{name} is {_quoted(event[name])}, not a number")
            integers = self._integers[name]
            if integers and not integers.include(event[name]):
                raise BadRecordError(f"{name} is {event[name]}, not an integer {integers.words}")
        event_id = event[self._names[0]]
        if type(event_id) is not int:
            raise BadRecordError(f"{self._names[0]} is {event_id}, not an integer")
        for name in self._names[1:]:
            if abs(event[name]) > LARGEST:
                raise BadRecordError(f"{name} is {event[name]}, too large for a 32-bit float")
        return self._numbers_of(event), sorted(event.keys() - self._integers.keys())

    def events(self, values: pyarrow.BinaryArray) -> pyarrow.StructArray:
        """Return the events of an Arrow batch, as `parse_events` describes them."""
        size, pack_into = self._packed.size, self._packed.pack_into
        table = bytearray(size * len(values))
        reasons: list[str | None] = [None] * len(values)
        unused: list[list[str] | None] = [None] * len(values)
        reported: set[str] = set()
        for index, value in enumerate(values.to_pylist()):
            numbers = self._fast_numbers(value)
            if numbers is None:
                try:
                    numbers, surplus = self.event(value)
                except BadRecordError as error:
                    reasons[index] = str(error)
                    continue
                names = dict.fromkeys(name[:_NAME_LENGTH] for name in surplus)
                new = [name for name in names if name not in reported]
                new = new[: _NAMES_REPORTED - len(reported)]
                unused[index] = [printable(name) for name in new] or None
                reported.update(new)
            pack_into(table, index * size, *numbers)
        return self._as_arrow(table, reasons, unused, values)

    def _fast_numbers(self, value: bytes | None) -> Sequence[float] | None:
        """Return a record's numbers if it is certainly good; otherwise None, and `event` decides.

        The decoder accepts these fields only, all of them numbers. So only names contain text, and
        if there are as many colons as fields, no name is duplicated.
        """
        if value is None or not self._decoder or value.count(b":") != len(self._names):
            return None
        try:
            numbers = msgspec.structs.astuple(self._decoder.decode(value))
        except ValueError:  # also the base class of msgspec's errors
            return None
        for place, integers in self._whole_numbers:
            if not integers.include(numbers[place]):
                return None
        return numbers

    def _as_arrow(
        self,
        table: bytearray,
        reasons: list[str | None],
        unused: list[list[str] | None],
        values: pyarrow.BinaryArray,
    ) -> pyarrow.StructArray:
        """Return a packed table of ids and features, with the reasons, as an array of structs."""
        ids = np.frombuffer(table, dtype="<i8").reshape(len(reasons), -1)[:, 0]
        features = np.frombuffer(table, dtype="<f8").reshape(len(reasons), -1)[:, 1:]
        # All events at once, because checking each number separately takes as long as parsing.
        for index in np.flatnonzero((np.abs(features) > LARGEST).any(axis=1)):
            try:
                self.event(values[index].as_py())
            except BadRecordError as error:
                reasons[index] = str(error)
        bad = np.array([reason is not None for reason in reasons], dtype=bool)
        if self._narrow:
            features[:, self._narrow] = features[:, self._narrow].astype("float32")
        arrays = [
            pyarrow.array(ids, mask=bad),
            list_array(features[~bad], bad),
            pyarrow.array(reasons, pyarrow.string()),
            pyarrow.array(unused, pyarrow.list_(pyarrow.string())),
        ]
        return pyarrow.StructArray.from_arrays(arrays, [self._names[0], *event_type().names[1:]])


@functools.lru_cache(maxsize=8)
def _parser(schema_json: str) -> _Parser:
    """Return the parser of a schema, cached because creating it takes longer than an event."""
    schema = StructType.fromJson(json.loads(schema_json))
    check_schema(schema)
    return _Parser(schema)


def _json_object(value: bytes | None) -> Mapping[str, Any]:
    """Return the JSON object in a record's bytes, or raise `BadRecordError`."""
    if value is None:
        raise BadRecordError("it has no value (a tombstone)")
    try:
        event = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise BadRecordError(f"it is not JSON: {error}") from None
    if not isinstance(event, dict):
        raise BadRecordError(f"it is {_quoted(event)}, not a JSON object")
    if value.count(b"[") + value.count(b"{") > _DEEPEST and _depth(event) > _DEEPEST:
        raise BadRecordError("it is nested too deeply")
    if value.count(b":") != len(event):
        _check_names_differ(value)
    return event


def _depth(value: object) -> int:
    """Return how many levels of arrays and objects a JSON value has."""
    levels, inner = 0, [value]
    while inner := [part for part in inner if isinstance(part, list | dict)]:
        levels += 1
        inner = [
            part
            for each in inner
            for part in (each.values() if isinstance(each, dict) else each)
        ]
    return levels


def _check_names_differ(value: bytes) -> None:
    """Raise `BadRecordError` for duplicate names in an object, because orjson keeps the last."""
    pairs = json.loads(value.decode(), object_pairs_hook=list, parse_int=str, parse_float=str)
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise BadRecordError(f"{_quoted(name)} occurs twice")
        seen.add(name)


def _quoted(value: object) -> str:
    """Return a JSON value as short text."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = printable(orjson.dumps(value).decode())
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
