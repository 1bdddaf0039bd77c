"""Names, types and paths of any kind go the whole way, from bytes to results and dead letters."""

import json
import uuid

import keras
import numpy as np
import pytest
from kafka import KafkaConsumer
from pyspark.ml.functions import vector_to_array
from pyspark.sql.types import DoubleType, IntegerType, LongType, StructType

from helpers.records import (
    json_to_dataframe_row,
    keep_bad_records,
    named,
    parse_events,
    to_columns,
)
from helpers.serving import Contract, ServingModel, ServingTransformer, scaled_network
from helpers.sinks import ParquetSink, read_bad_records, read_scored
from helpers.streaming import OffsetRange, RangeReader
from helpers.transformers import LabelIndexTransformer, ModelPredictor

IDS = ["event-id", "time stamp", "Prüf_Nr", "a.b`c", "select", "1;{}()\n\t=,*"]
FEATURES = ["offset", "Key", "a.b.c", "`", "mass`.x", "event", "bad", "batch", "日本", "end", "x-y"]
SETTINGS = [
    {
        "spark.sql.ansi.enforceReservedKeywords": "true",
        "spark.sql.timestampType": "TIMESTAMP_NTZ",
        "spark.sql.session.timeZone": "Asia/Tokyo",
    },
    {"spark.sql.caseSensitive": "true", "spark.sql.ansi.enabled": "false"},
]


@pytest.fixture(params=SETTINGS, ids=["keywords and times", "case"])
def session(spark, request):
    """The session with other settings."""
    before = {name: spark.conf.get(name) for name in request.param}
    for name, value in request.param.items():
        spark.conf.set(name, value)
    yield spark
    for name, value in before.items():
        spark.conf.set(name, value)


@pytest.fixture(scope="module")
def network():
    """A network with an input for each feature."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [keras.Input((len(FEATURES),)), keras.layers.Dense(2, activation="softmax")]
    )


def schema_of(event_id):
    """Return a schema of the features, with an integer among them."""
    schema = StructType().add(event_id, LongType()).add(FEATURES[0], IntegerType())
    for name in FEATURES[1:]:
        schema = schema.add(name, DoubleType())
    return schema


def events_of(event_id, count=20):
    """Return events, with values that differ."""
    return [{event_id: n, **{name: n + i for i, name in enumerate(FEATURES)}} for n in range(count)]


def expected(network, count=20):
    """Return the probabilities that Keras alone computes, by id."""
    rows = [[n + i for i in range(len(FEATURES))] for n in range(count)]
    return network.predict(np.array(rows, dtype="float32"), verbose=0)


@pytest.fixture
def records_of(spark, kafka, produce):
    """Write events and a bad record to a new topic, and return the topic and its records."""

    def make(events):
        topic = f"names-{uuid.uuid4()}"
        kafka.create_topic(topic, partitions=1)
        produce(topic, [*(json.dumps(event).encode() for event in events), b"rubbish"])
        ranges = [OffsetRange(topic, 0, 0, len(events) + 1)]
        reader = RangeReader(spark, {"bootstrap.servers": kafka.bootstrap_servers})
        return ranges, reader.read(ranges)

    return make


def whole_way(spark, kafka, path, event_id, ranges, records, network):
    """Score records into a sink with dead letters, check the results, and return their rows."""
    predictor = ModelPredictor(keras_model=network, features_col="event")
    scored = predictor.transform(parse_events(records, schema_of(event_id)))
    scored = keep_bad_records(LabelIndexTransformer().transform(scored))
    settings = {"bootstrap.servers": kafka.bootstrap_servers}
    (topic,) = {part.topic for part in ranges}
    with ParquetSink(
        spark, path, signal_index=0, event_id=event_id, on_bad_record="dead-letter",
        settings=settings,
    ) as sink:  # fmt: skip
        sink.begin({}, {topic: "the-id"})
        counts = sink.write(scored, ranges)
    assert (counts.events, counts.bad) == (20, 1)
    found = read_scored(spark, path)
    assert found.columns[0] == event_id
    rows = sorted(found.collect())
    assert [row[0] for row in rows] == list(range(20))
    np.testing.assert_allclose([row[1:3] for row in rows], expected(network), atol=1e-6)
    (bad,) = read_bad_records(spark, path).collect()
    assert bytes(bad.value) == b"rubbish"
    with KafkaConsumer(
        f"{topic}.dead-letter", bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest", consumer_timeout_ms=30_000,
    ) as consumer:  # fmt: skip
        letter = next(consumer)
    assert letter.value == b"rubbish"
    assert int(dict(letter.headers)["timestamp"]) == round(bad.event_time.timestamp() * 1000)
    return rows


@pytest.mark.parametrize("event_id", IDS)
def test_an_id_of_any_name_is_stored_and_read_back(
    spark, kafka, tmp_path, records_of, network, event_id
):
    """Events whose id and features have odd names are scored, stored and read back."""
    ranges, records = records_of(events_of(event_id))
    whole_way(spark, kafka, tmp_path / "scored", event_id, ranges, records, network)


def test_settings_of_a_session_change_no_result(
    session, kafka, tmp_path, records_of, network
):
    """Neither keywords nor time zones, case or the type of timestamps change what is stored."""
    ranges, records = records_of(events_of("reading"))
    path = tmp_path / "x*[1]"
    rows = whole_way(session, kafka, path, "reading", ranges, records, network)
    sent = dict(records.select("offset", records.timestamp.cast("double")).collect())
    assert {row.offset: row.event_time.timestamp() for row in rows}.items() <= sent.items()


@pytest.mark.parametrize("event_id", IDS)
def test_columns_and_rows_have_the_fields_names(spark, event_id):
    """Columns and rows agree, whatever the fields are called."""
    schema, events = schema_of(event_id), events_of(event_id, 3)
    texts = [json.dumps(event).encode() for event in events]
    records = spark.createDataFrame([(text,) for text in texts], "value binary").coalesce(1)
    table = to_columns(records, schema)
    assert table.schema == schema
    rows = [json_to_dataframe_row(text, schema) for text in texts]
    assert [tuple(row) for row in table.collect()] == [tuple(row) for row in rows]
    assert table.select(named(event_id)).collect() == [(n,) for n in range(3)]


def test_a_serving_model_takes_columns_of_any_name(spark, network):
    """A serving model finds the columns of its features, whatever they are called."""
    count = len(FEATURES)
    contract = Contract(
        feature_names=tuple(FEATURES), means=(0.0,) * count, scales=(1.0,) * count,
        class_names=("background", "signal"), signal_index=1, threshold=0.5,
        training_data="none", metrics={}, event_id="event-id",
    )  # fmt: skip
    model = ServingModel(scaled_network(network, contract.means, contract.scales), contract)
    assert contract.faults() == []
    schema = schema_of("event-id")
    rows = [
        json_to_dataframe_row(json.dumps(event), schema) for event in events_of("event-id")
    ]
    table = spark.createDataFrame(rows, schema).coalesce(1)
    scored = ServingTransformer(model).transform(table)
    found = scored.select(vector_to_array("prediction")).collect()
    np.testing.assert_allclose([row[0] for row in found], expected(network), atol=1e-6)


@pytest.mark.parametrize("event_id", ["offset", "Bad", "event_time", "", None])
def test_a_sink_refuses_an_id_that_is_another_column(spark, tmp_path, event_id):
    """A sink refuses an id with the name of another column when it is made, and writes nothing."""
    with pytest.raises(ValueError, match=r"has the name of a column of Kafka|has no name"):
        ParquetSink(spark, tmp_path / "scored", signal_index=0, event_id=event_id)
    assert list(tmp_path.iterdir()) == []
