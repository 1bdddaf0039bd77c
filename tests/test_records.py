"""Records: which ones are valid, in Python and in Spark, and what happens to the others."""

import contextlib
import json
import math

import orjson
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DecimalType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
)

from helpers.higgs import EVENT_ID, FEATURES, SCHEMA
from helpers.model import build_model, normalized_network
from helpers.records import (
    BadRecordError,
    _parser,
    json_to_dataframe_row,
    keep_bad_records,
    parse_events,
    to_columns,
)
from helpers.streaming import OffsetRange, RangeReader
from helpers.transformers import LabelIndexTransformer, ModelPredictor

NAMES = (EVENT_ID, *FEATURES)
GOOD = {
    EVENT_ID: 100_000,
    **{name: 1.5 + index for index, name in enumerate(FEATURES)},
    "PRI_jet_num": 2,
}
GOOD_TEXT = json.dumps(GOOD).encode()


def changed(**fields):
    """Return the good record with some fields replaced or added."""
    return json.dumps({**GOOD, **fields}).encode()


def with_literal(name, literal):
    """Return the good record with a literal that `json.dumps` can't write."""
    return changed(**{name: "PLACE"}).replace(b'"PLACE"', literal)


def without(name):
    """Return the good record without a field."""
    return json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()


def twice(name, value):
    """Return the good record with a field appended, even if its name exists already."""
    return GOOD_TEXT[:-1] + f', "{name}": {json.dumps(value)}}}'.encode()


BAD = [
    (b"higgs", "it is not JSON: unexpected character"),
    (b"", "it is not JSON: .*empty"),
    (None, r"it has no value \(a tombstone\)"),
    (b"\xff\xfe\x00", "it is not JSON: .*UTF-8"),
    (GOOD_TEXT + b" and more", "it is not JSON: unexpected content after document"),
    (GOOD_TEXT + GOOD_TEXT, "it is not JSON: unexpected content after document"),
    (GOOD_TEXT[:-5], "it is not JSON"),
    (b"\xef\xbb\xbf" + GOOD_TEXT, "it is not JSON"),
    (b"[1, 2]", "it is an array, not a JSON object"),
    (b"null", "it is null, not a JSON object"),
    (b"{}", "EventId is missing"),
    (without("PRI_met"), "PRI_met is missing"),
    (with_literal("DER_mass_vis", b"NaN"), "it is not JSON"),
    (with_literal("DER_mass_vis", b"-Infinity"), "it is not JSON"),
    (with_literal("DER_mass_vis", b"1e999"), "it is not JSON: number is infinity"),
    (changed(DER_mass_vis="12.5"), 'DER_mass_vis is "12.5", not a number'),
    (changed(DER_mass_vis=None), "DER_mass_vis is null, not a number"),
    (changed(DER_mass_vis=True), "DER_mass_vis is true, not a number"),
    (changed(DER_mass_vis=[1.0]), "DER_mass_vis is an array, not a number"),
    (changed(DER_mass_vis="x" * 10**6), 'DER_mass_vis is "x{39}\\.\\.\\., not a number'),
    (changed(PRI_jet_num=2.5), "PRI_jet_num is 2.5, not an integer of 32 bits"),
    (changed(PRI_jet_num=2**31), "PRI_jet_num is 2147483648, not an integer of 32 bits"),
    (changed(EventId=100_000.0), "EventId is 100000.0, not an integer"),
    (changed(PRI_met=1e39), "PRI_met is 1e\\+39, too large for a 32-bit float"),
    (changed(PRI_met=-(10**39), Weight=1), "PRI_met is -1[0.e+]*39?0*, too large for a 32-bit"),
    (changed(EventId="100000"), 'EventId is "100000", not a number'),
    (changed(EventId=2**63), "EventId is 9223372036854775808, not an integer of 64 bits"),
    (twice("PRI_met", 7), '"PRI_met" occurs twice'),
    (twice("EventId", {"a": 1}), '"EventId" occurs twice'),
    (twice("Weight", 1)[:-1] + b', "Weight": 2}', '"Weight" occurs twice'),
    (b"[" * 900 + b"]" * 900, "it is an array"),
    (GOOD_TEXT[:-1] + b', "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "it is not JSON"),
    (b"\x00" * 2**20, "it is not JSON"),
]


@pytest.mark.parametrize("value, reason", BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_record_is_refused_with_its_reason(value, reason):
    """A bad record is refused with the same reason in Spark and in Python."""
    (event,) = _parser(SCHEMA.json()).events(pyarrow.array([value], pyarrow.binary())).to_pylist()
    assert event["EventId"] is event["features"] is None
    with pytest.raises(BadRecordError, match=reason):
        raise BadRecordError(event["reason"])
    if value is not None:
        with pytest.raises(BadRecordError, match=reason):
            json_to_dataframe_row(value)


GOOD_ONES = [
    GOOD_TEXT,
    b" \n" + GOOD_TEXT + b"\t ",
    changed(PRI_jet_num=2.0),
    changed(DER_mass_vis=5),
    changed(EventId=2**63 - 1),
    changed(EventId=-(2**63)),
    changed(Weight=1.0, note="a: b", nested={"EventId": "x"}),
    GOOD_TEXT.replace(b'"EventId"', b'"\\u0045ventId"'),
    with_literal("DER_mass_vis", b"-0"),
    with_literal("DER_mass_vis", b"3.4028235e38"),
    with_literal("DER_mass_vis", b"1E+2"),
]


@pytest.mark.parametrize("value", GOOD_ONES, ids=range(len(GOOD_ONES)))
def test_a_good_record_is_taken_however_it_is_written(value):
    """A good record is accepted however its JSON is written."""
    (event,) = _parser(SCHEMA.json()).events(pyarrow.array([value])).to_pylist()
    assert event["reason"] is None
    expected = json.loads(value)
    assert event["EventId"] == expected["EventId"]
    assert event["features"] == [expected[name] for name in FEATURES]
    row = json_to_dataframe_row(value)
    assert list(row.asDict()) == list(NAMES)
    assert tuple(row) == tuple(expected[name] for name in NAMES)


def judge(value):
    """Return a record's numbers, or None if it is bad, as Python's JSON parser reads it.

    This is a second implementation of the definition in `helpers.records`.
    """
    names = []

    def refuse(constant):
        raise ValueError(constant)

    def finite(text):
        number = float(text)
        return number if math.isfinite(number) else refuse(text)

    def integer(text):
        finite(text)
        return int(text)

    def pairs(found):
        names[:] = [name for name, _ in found]  # the outermost object comes last
        return dict(found)

    try:
        text = value.decode("utf-8")
        event = json.loads(
            text, parse_constant=refuse, parse_float=finite, parse_int=integer,
            object_pairs_hook=pairs,
        )
        json.dumps(event, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
    except (AttributeError, ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or len(set(names)) < len(names):
        return None
    numbers = [event.get(name) for name in NAMES]
    if any(type(number) not in (int, float) for number in numbers):
        return None
    jets = event["PRI_jet_num"]
    if not (float(jets).is_integer() and -(2**31) <= jets < 2**31):
        return None
    if any(abs(number) > 3.4028234663852886e38 for number in numbers[1:]):
        return None  # it would be infinite for the network
    if type(event[EVENT_ID]) is not int or not -(2**63) <= event[EVENT_ID] < 2**63:
        return None
    return numbers


_NAME = st.sampled_from(NAMES)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_LITERAL = st.sampled_from(
    [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e400", b"01", b"+1", b".5", b"1.", b"0x10",
     b"1_000", b"'1'", b"None", b"true", b"1e5", b"-0", b"1" * 400, b"\xd9\xa1", b'"\\ud800"', b""]
)  # fmt: skip


@st.composite
def damaged_bytes(draw):
    """A good record with some bytes removed, inserted or replaced."""
    start = draw(st.integers(0, len(GOOD_TEXT)))
    length = draw(st.integers(0, 12) | st.integers(0, len(GOOD_TEXT)))
    return GOOD_TEXT[:start] + draw(st.binary(max_size=6)) + GOOD_TEXT[start + length :]


DAMAGED = st.one_of(
    st.none(),
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    _JSON.map(lambda value: json.dumps(value).encode()),
    damaged_bytes(),
    st.builds(lambda name, value: changed(**{name: value}), _NAME, _JSON),
    st.builds(with_literal, _NAME, _LITERAL),
    st.builds(without, _NAME),
    st.builds(twice, _NAME | st.text(max_size=5).filter(lambda n: n.isalnum()), _JSON),
    st.builds(lambda before, after: before + GOOD_TEXT + after, st.binary(max_size=3),
              st.binary(max_size=3)),
    st.builds(lambda number: changed(EventId=number), st.integers(-(2**65), 2**65)),
    st.builds(lambda number: changed(PRI_jet_num=number), st.floats(-1e10, 1e10) | st.integers()),
    st.dictionaries(st.text(max_size=5), _JSON, min_size=1, max_size=3).map(
        lambda more: changed(**{**more, **GOOD})
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def damaged():
    """At least 2,000 different damaged records, the same ones in each run."""
    found = {}

    @settings(max_examples=4_000, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(DAMAGED)
    def collect(value):
        found.setdefault(value)

    collect()
    assert len(found) >= 2_000
    return list(found)


def test_2000_kinds_of_damage_are_judged_by_the_definition(damaged):
    """The parsers accept exactly the records that the definition accepts."""
    events = _parser(SCHEMA.json()).events(pyarrow.array(damaged, pyarrow.binary())).to_pylist()
    for value, event in zip(damaged, events, strict=True):
        numbers = judge(value)
        assert (event["reason"] is None) == (numbers is not None), (value, event["reason"])
        if numbers is not None:
            # A feature is a 64-bit float, even if it was sent as an integer that has no exact one.
            numbers[1:] = map(float, numbers[1:])
            assert [event["EventId"], *event["features"]] == numbers
            assert list(json_to_dataframe_row(value)) == numbers
        elif value is not None:
            with pytest.raises(BadRecordError):
                json_to_dataframe_row(value)
    bad = sum(event["reason"] is not None for event in events)
    assert bad >= 2_000 and len(events) - bad > 100  # both kinds occur


@pytest.mark.parametrize(
    "event_id, is_good", [(2**31 - 1, True), (2**31, False), (-(2**40), False)]
)
@pytest.mark.parametrize("more", [{}, {"unused": 1}])
def test_an_id_must_fit_the_schema_whichever_parser_reads_it(event_id, is_good, more):
    """An id must fit the schema's integer type, whichever parser reads the record."""
    schema = StructType().add("id", IntegerType()).add("x", DoubleType())
    value = json.dumps({"id": event_id, "x": 1.0, **more}).encode()
    (event,) = _parser(schema.json()).events(pyarrow.array([value])).to_pylist()
    assert (event["reason"] is None) is is_good
    with contextlib.nullcontext() if is_good else pytest.raises(BadRecordError, match="32 bits"):
        json_to_dataframe_row(value, schema)


@pytest.fixture(scope="module")
def pipeline():
    """The walkthrough's steps, from Kafka records to scores and bad records."""
    predictor = ModelPredictor(normalized_network(build_model()), features_col="event")

    def score(records):
        scored = LabelIndexTransformer().transform(predictor.transform(parse_events(records)))
        return keep_bad_records(scored)

    return score


def test_no_record_vanishes_and_none_stops_the_batch(
    spark, kafka, topic, produce, pipeline, damaged
):
    """Each record of a batch is either scored, or kept as bad with its value and reason."""
    values = [*damaged, GOOD_TEXT, b"\x00" * 1_000_000]
    metadata = produce(topic, values, [str(index).encode() for index in range(len(values))])
    reader = RangeReader(spark, {"bootstrap.servers": kafka.bootstrap_servers})
    places = {(part.partition, part.offset): value
              for part, value in zip(metadata, values, strict=True)}
    ends = {partition: 0 for partition, _ in places}
    for partition, _ in places:
        ends[partition] += 1
    records = reader.read([OffsetRange(topic, number, 0, end) for number, end in ends.items()])
    rows = pipeline(records).collect()

    good = [value for value in values if judge(value) is not None]
    scored = [row for row in rows if row.bad is None]
    assert len(scored) == len(good)
    assert sorted(row.EventId for row in scored) == sorted(json.loads(v)[EVENT_ID] for v in good)
    bad = [row for row in rows if row.bad is not None]
    assert len(bad) == len(values) - len(good)
    for row in bad:
        assert row.EventId is row.prediction is row.predicted_index is None
        assert row.topic == topic
        stored = None if row.bad.value is None else bytes(row.bad.value)
        assert stored == places.pop((row.partition, row.offset))
        assert row.timestamp is not None
        assert row.bad.reason


def test_a_record_crosses_into_python_once(spark, pipeline):
    """The pipeline is one Python stage; two would be a third slower, and parse twice."""
    columns = "key binary, value binary, topic string, partition int, offset long, "
    records = spark.createDataFrame([], columns + "timestamp timestamp")
    plan = pipeline(records)._jdf.queryExecution().executedPlan().toString()
    assert plan.count("ArrowEvalPython") == 1


def test_names_without_use_are_told_once_in_a_batch(spark):
    """Unused field names are reported once per batch, up to 20 of them."""
    values = [changed(Weight=1), changed(Weight=2, run=7), GOOD_TEXT]
    values += [changed(**{f"field{number}": 0}) for number in range(100)]
    records = spark.createDataFrame([(bytearray(value),) for value in values], "value binary")
    found = parse_events(records.coalesce(1)).select("event.*").collect()
    assert [row.unused for row in found[:3]] == [["Weight"], ["run"], None]
    assert sum(len(row.unused or []) for row in found) == 20
    assert all(row.reason is None for row in found)


def test_columns_keep_the_order_of_the_schema(event_values):
    """A row's columns have the schema's order, whatever their order in the record."""
    shuffled = dict(reversed(orjson.loads(event_values[0]).items()))
    row = json_to_dataframe_row(orjson.dumps(shuffled).decode())
    assert list(row.asDict()) == list(NAMES)


def test_integers_stay_integers_and_become_floats_where_the_schema_says_so():
    """Integers become floats where the schema has doubles, and ids stay integers."""
    row = json_to_dataframe_row(changed(DER_mass_vis=5, PRI_jet_num=2.0, surplus="left out"))
    assert isinstance(row.EventId, int)
    assert isinstance(row.PRI_jet_num, int)
    assert isinstance(row.DER_mass_vis, float)


def test_spark_and_python_parse_alike(spark, event_values):
    """Spark and Python parse records into the same rows."""
    records = spark.createDataFrame([(bytearray(value),) for value in event_values], "value binary")
    in_spark = to_columns(records)
    in_python = [json_to_dataframe_row(value.decode()) for value in event_values]
    assert in_spark.schema == SCHEMA
    assert [tuple(row) for row in in_spark.collect()] == [tuple(row) for row in in_python]


def test_a_schema_of_ones_own(spark):
    """Records can be parsed and checked with a user-defined schema."""
    schema = StructType(
        [
            StructField("reading", LongType()),
            StructField("temperature", DoubleType()),
            StructField("switches", IntegerType()),
        ]
    )
    values = [b'{"switches": 3, "temperature": 20, "reading": 7}', b'{"reading": 8}']
    records = spark.createDataFrame([(bytearray(value),) for value in values], "value binary")
    events = parse_events(records, schema).select("event.*").collect()
    assert (events[0].reading, events[0].features) == (7, [20.0, 3.0])
    assert events[1].reason == "temperature is missing"
    assert to_columns(records, schema).where(F.col("reading").isNotNull()).first() == (7, 20.0, 3)
    assert json_to_dataframe_row(values[0], schema).switches == 3


@pytest.mark.parametrize(
    "number",
    [2**53 - 1, 1 - 2**53, 2**53, 2**53 + 0.0, 2**53 + 1, -(2**53) - 1, 2**63 - 1, 1e17, 7.0],
)
def test_both_ways_give_the_same_integers(spark, number):
    """An integer feature is exact in both ways, or makes the record a bad one in both."""
    schema = StructType().add("id", LongType()).add("run", LongType()).add("x", FloatType())
    value = json.dumps({"id": 2**63 - 1, "run": number, "x": 0.1}).encode()
    records = spark.createDataFrame([(value,)], "value binary")
    found = to_columns(records, schema).first()
    if abs(number) < 2**53:
        assert json_to_dataframe_row(value, schema) == found == (2**63 - 1, number, found.x)
    else:
        assert found == (None, None, None)
        with pytest.raises(BadRecordError, match=r"not an integer strictly between -2\*\*53"):
            json_to_dataframe_row(value, schema)


@pytest.mark.parametrize("text", [b"9007199254740993.0", b"-9007199254740992.6"])
def test_a_fraction_that_a_float_rounds_to_a_large_integer_is_bad(text):
    """The network gets the integer that the record has, or the record is bad."""
    schema = StructType().add("id", LongType()).add("run", LongType())
    with pytest.raises(BadRecordError, match=r"not an integer strictly between -2\*\*53"):
        json_to_dataframe_row(b'{"id": 1, "run": %s}' % text, schema)


def test_a_float_is_rounded_in_both_ways(spark):
    """A 32-bit float has the same value in the stream, in a table and in a row."""
    schema = StructType().add("id", LongType()).add("x", FloatType())
    value = b'{"id": 1, "x": 16777217}'
    records = spark.createDataFrame([(value,)], "value binary")
    parsed = parse_events(records, schema).select("event.features").first().features
    assert parsed == [16_777_216.0]
    assert to_columns(records, schema).first().x == json_to_dataframe_row(value, schema).x


@pytest.mark.parametrize("calls", [0, 400])
@pytest.mark.parametrize("levels, reason", [(99, None), (101, "it is nested too deeply")])
def test_how_deep_a_record_may_be_depends_on_the_record_only(calls, levels, reason):
    """Python's own limit depends on how many functions are running."""
    schema = StructType().add("id", LongType()).add("x", FloatType())
    inner = b'{"a": ' * levels + b"1" + b"}" * levels

    def parse(calls):
        return parse(calls - 1) if calls else json_to_dataframe_row(
            b'{"id": 1, "x": 2, "other": %s}' % inner, schema
        )

    if reason is None:
        assert parse(calls).x == 2
    else:
        with pytest.raises(BadRecordError, match=reason):
            parse(calls)


def with_id(*fields):
    """Return a schema of an id and some fields."""
    fields = [StructField(*field) for field in (("id", LongType()), *fields)]
    return StructType(fields)


UNUSABLE = [
    ("id long, x double", "must be a StructType of the event's id and at least one feature"),
    (StructType(), "at least one feature, such as StructType"),
    (with_id(), "at least one feature, such as StructType"),
    (StructType().add("id", StringType()).add("x", DoubleType()), "'id', is a string: begin with"),
    (StructType().add("id", DoubleType()).add("x", DoubleType()), "'id', is a double: begin with"),
    (with_id(("x", BooleanType())), "feature 'x' is a boolean, not a number"),
    (with_id(("x", StringType())), "feature 'x' is a string, not a number"),
    (with_id(("x", SCHEMA)), "feature 'x' is a struct<.*>, not a number"),
    (with_id(("x", ArrayType(DoubleType()))), "'x' is a array<double>, not"),
    (with_id(("x", DecimalType())), r"'x' is a decimal\(10,0\), not a number"),
    (with_id(("x", VectorUDT())), "'x' is a vector, not a number"),
    (with_id(("id", DoubleType())), "the id 'id' is also a feature"),
    (with_id(("ID", DoubleType())), "the id 'id' is also a feature"),
    (with_id(("x", LongType()), ("X", LongType())), "named twice: X, x"),
    (with_id(("", DoubleType())), "a field has no name"),
    (with_id(("Prediction", DoubleType())), "'Prediction' has the name of a"),
    *[
        (StructType().add(name, LongType()).add("x", DoubleType()), f"the id '{name}' has the name")
        for name in (
            "key", "Offset", "TIMESTAMP", "topic", "reason", "prediction", "batch", "bad", "event",
            "unused", "features", "event_time", "probability_0", "model_version",
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize("schema, reason", UNUSABLE)
def test_a_schema_that_cannot_be_used_is_refused_when_it_is_given(spark, schema, reason):
    """An unusable schema is refused at once, in the same words wherever it is given."""
    records = spark.createDataFrame([(b"{}",)], "value binary")
    for use in (parse_events, to_columns):
        with pytest.raises(ValueError, match=reason):
            use(records, schema)
    if isinstance(schema, StructType):
        with pytest.raises(ValueError, match=reason):
            json_to_dataframe_row("{}", schema)


@pytest.mark.parametrize("character", ["\x1b[2J", "\n", "\r", "\x7f", "\x9b", "\u202e", "\u2028"])
def test_what_a_record_says_reaches_no_terminal_raw(spark, event_values, character):
    """Control and bidirectional characters of a record are escaped in messages."""
    event = orjson.loads(event_values[0])
    name = f"a{character}b"
    values = [
        orjson.dumps({**event, name: 1}),
        orjson.dumps({**event, "DER_mass_MMC": name}),
        orjson.dumps(name),
        b'{"a": 1, %s: 2, %s: 3}' % ((orjson.dumps(name),) * 2),
    ]
    records = spark.createDataFrame([(value,) for value in values], "value binary")
    texts = []
    for row in parse_events(records).select("event.reason", "event.unused").collect():
        texts += [row.reason] if row.reason else row.unused
    assert len(texts) == 4
    assert all(text.isprintable() and "a" in text and "b" in text for text in texts)
