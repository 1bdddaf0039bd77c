"""The notebook on Structured Streaming: its mix of events, its windows, and its exercises."""

import pandas as pd
import pytest
from kafka import KafkaProducer
from notebook_cells import run_cells, solution

from helpers.broker import python_settings
from helpers.higgs import EVENT_ID, FEATURES, LABEL, MISSING
from helpers.model import build_model, normalized_network
from helpers.sinks import read_scored

NAME = "2_structured_streaming"
COUNT = 160  # events, in eight parts of 20


@pytest.fixture(scope="module")
def notebook_names(spark, kafka, produce):
    """The names of the notebook that the exercises use, with a small topic that is scored."""
    kafka.create_topic("structured-notebook", partitions=1)
    names = run_cells(NAME, ["parameters", "new-events", "produce"], {"spark": spark})
    settings = {"bootstrap.servers": kafka.bootstrap_servers}
    names |= {"read_scored": read_scored, "KafkaProducer": KafkaProducer}
    names |= {"python_settings": python_settings}
    names |= {"kafka_settings": settings, "topic": "structured-notebook"}
    events = names["new_events"](COUNT, 100_000)
    values = events[[EVENT_ID, *FEATURES]].to_json(orient="records", lines=True).splitlines()
    produce("structured-notebook", [value.encode() for value in values])
    functions = ["process-instances", "read-topic", "sink", "score-with-query", "write-parquet"]
    names = run_cells(NAME, [*functions, "window-shares", "collect-windows"], names)
    names |= {"sink": names["new_sink"](), "checkpoint": names["new_folder"](), "sent": events}
    names["score_with_query"](names["sink"], names["checkpoint"])
    return names


@pytest.fixture(scope="module")
def new_events():
    """The notebook's generator of events whose share of signal changes."""
    return run_cells(NAME, ["new-events"], {})["new_events"]


def test_the_share_of_class_0_follows_the_mix(new_events):
    """The network, although it is not trained, sees the mix change: there is something to plot."""
    events = new_events(8_000, 100_000)
    network = normalized_network(build_model())
    probabilities = network.predict(events[list(FEATURES)].to_numpy("float32"), verbose=0)
    part = events.index // 1_000
    true_share = (events[LABEL] == "s").groupby(part).mean()
    share = pd.Series(probabilities.argmax(axis=1) == 0).groupby(part).mean()
    assert share.max() - share.min() > 0.1
    assert share.corr(true_share) > 0.9


@pytest.mark.parametrize("count", [1, 7, 160, 1_001])
def test_new_events_are_as_many_as_asked_for_with_ids_in_a_row(new_events, count):
    """A number that eight parts don't divide still gives as many events."""
    ids = new_events(count, 100_000)[EVENT_ID]
    assert ids.tolist() == list(range(100_000, 100_000 + count))


def test_the_threshold_is_changed_without_scoring_again(notebook_names):
    """A higher threshold leaves fewer events in class 0, and some."""
    at_050, at_051 = solution(NAME, 1, notebook_names)
    assert COUNT > at_050 > at_051 > 0


def test_a_missing_feature_is_counted_per_window(notebook_names):
    """The windows have all events, and the events without jets are those that were sent."""
    view = solution(NAME, 2, notebook_names)
    without_jets = (notebook_names["sent"]["PRI_jet_leading_pt"] == MISSING).sum()
    assert view["events"].sum() == COUNT
    assert (view["share"] * view["events"]).sum() == pytest.approx(without_jets, abs=1)


def test_a_broken_record_is_kept_with_its_reason_or_becomes_a_row_of_nulls(notebook_names):
    """The sink has the record's reason; Spark's file sink has a row without an id."""
    assert solution(NAME, 3, notebook_names) == ([f"{FEATURES[0]} is missing"], 1)
