"""Functions on Arrow columns with a Spark that has them, and with one from before Spark 4.1."""

import json

import pytest
from pyspark.sql import functions as F

from helpers import records, transformers
from helpers.higgs import EVENT_ID
from helpers.model import build_model, normalized_network
from helpers.records import parse_events
from helpers.transformers import LabelIndexTransformer, ModelPredictor

LARGE_ID = 2**62 + 1  # which is not exact as a floating-point number


@pytest.fixture
def forget():
    """Forget the functions that were made before the test, and those made in it."""

    def forget():
        records._event_column.cache_clear()
        transformers._network_function.cache_clear()

    forget()
    yield forget
    forget()


def test_an_older_spark_has_the_same_results(spark, event_values, monkeypatch, forget):
    """Without ``arrow_udf``, events, reasons, unused fields and predictions are the same."""
    event = json.loads(event_values[0])
    large = json.dumps({**event, EVENT_ID: LARGE_ID, "other": 1}).encode()
    values = [large, b"rubbish", None, b"{}"]
    rows = [(bytearray(value) if value else None,) for value in [*event_values[:50], *values]]
    frame = spark.createDataFrame(rows, "value binary").coalesce(1)
    predictor = ModelPredictor(normalized_network(build_model()), features_col="event")

    def scored():
        forget()
        parsed = predictor.predict(parse_events(frame))
        return LabelIndexTransformer().transform(parsed).drop("value").collect()

    now = scored()
    monkeypatch.delattr(F, "arrow_udf")
    assert scored() == now
    assert [row.event[EVENT_ID] for row in now[50:]] == [LARGE_ID, None, None, None]
    assert now[50].event.unused == ["other"]
