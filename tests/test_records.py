"""From JSON to columns: one event at a time, and whole batches, with the same result."""

import orjson
import pytest

from helpers.higgs import EVENT_ID, FEATURES
from helpers.records import json_to_dataframe_row, to_columns


def test_columns_keep_the_order_of_the_schema(event_values):
    """Otherwise the network would get its features in another order than in training."""
    shuffled = dict(reversed(orjson.loads(event_values[0]).items()))
    row = json_to_dataframe_row(orjson.dumps(shuffled).decode())
    assert list(row.asDict()) == [EVENT_ID, *FEATURES]


def test_integers_stay_integers_and_become_floats_where_the_schema_says_so(event_values):
    """Otherwise `toDF` would fail on a mass of exactly 5, or event ids would be rounded."""
    event = {**orjson.loads(event_values[0]), "DER_mass_vis": 5, "surplus": "left out"}
    row = json_to_dataframe_row(orjson.dumps(event).decode())
    assert isinstance(row.EventId, int)
    assert isinstance(row.PRI_jet_num, int)
    assert isinstance(row.DER_mass_vis, float)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("no JSON", "unexpected|invalid"),
        ("[1, 2]", "must be a JSON object with EventId and the 30 features"),
        ('{"EventId": 1}', "the record has no 'DER_mass_MMC'"),
    ],
)
def test_a_text_that_is_no_event_is_refused(text, reason):
    """Otherwise an event of another kind would be scored as if it were one."""
    with pytest.raises(ValueError, match=reason):
        json_to_dataframe_row(text)


def test_spark_and_python_parse_alike(spark, event_values):
    """Otherwise the two streams of the walkthrough would count differently."""
    records = spark.createDataFrame([(bytearray(value),) for value in event_values], "value binary")
    in_spark = to_columns(records).collect()
    in_python = [json_to_dataframe_row(value.decode()) for value in event_values]
    assert [tuple(row) for row in in_spark] == [tuple(row) for row in in_python]
