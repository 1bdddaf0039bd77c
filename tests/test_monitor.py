"""The monitor: what it counts, what a terminal and a notebook show of it, and the plot."""

import io
import sys
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from processes import run_python
from pyspark.sql import functions as F

import helpers.monitor
from helpers.monitor import Batch, Monitor, MonitorError
from helpers.notebook import recorded, run

NOON = 1_704_110_400_000  # 2024-01-01, 12:00:00 UTC
NO_TIME = 0.1  # instead of COUNTS_SECONDS, where the counts never come

SETUP = """
import threading
from pyspark.sql import functions as F
from helpers.monitor import Batch, Monitor
from helpers.session import get_spark
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream

spark = get_spark(cores=1)
ssc = new_streaming_context(spark, 0.5)
settings = {{"bootstrap.servers": "{servers}", "auto.offset.reset": "earliest"}}
stream = KafkaUtils.createDirectStream(ssc, ["{topic}"], settings)
monitor = Monitor()
events = F.count(F.lit(1)).alias("events")
unused = F.collect_set(F.lit("<run>")).alias("unused")

def process(df, batch_id):
    with monitor.batch(batch_id) as counts:
        df.observe(counts, events, unused).write.format("noop").mode("overwrite").save()

stream.foreachBatch(process)
"""
ADD_MANY = """
def add():
    for number in range(25):
        monitor.add(Batch(number * 60_000, 1_000, 500, 0, 0.5, 25_000 - number * 1_000))

thread = threading.Thread(target=add)
thread.start()
thread.join(60)
"""


def observe(df, counts, *more, name="events"):
    """Have the rows of a DataFrame counted as events."""
    return df.observe(counts, F.count(F.lit(1)).alias(name), *more)


def monitor_of(*figures):
    """A monitor with batches a second apart, of their events, signal, seconds and lag."""
    monitor = Monitor()
    for number, (events, signal, seconds, lag) in enumerate(figures):
        monitor.add(Batch(NOON + number * 1_000, events, signal, 0, seconds, lag))
    return monitor


@pytest.fixture(scope="module")
def executed(kafka, produce, tmp_path_factory):
    """The outputs of a notebook's cells: a table that a stream fills, a plot, and another table."""
    kafka.create_topic("monitored", partitions=1)
    produce("monitored", [b"{}"] * 1_234)
    sources = {
        "setup": SETUP.format(servers=kafka.bootstrap_servers, topic="monitored"),
        "begin": "monitor.begin(lag=stream.lag_after)",
        "run": "run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)",
        "plot": "monitor.plot()",
        "begin again": "monitor.begin()",
        "add many": ADD_MANY,
        "totals": "monitor.totals()",
    }
    cells = [nbformat.v4.new_code_cell(source) for source in sources.values()]
    path = tmp_path_factory.mktemp("notebook") / "monitored.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    notebook, failure = run(path, {})
    assert failure is None, failure
    assert recorded(notebook)["events"] == 25_000
    return {name: cell.outputs for name, cell in zip(sources, notebook.cells, strict=True)}


def test_a_notebooks_table_is_in_the_cell_that_began_it_and_holds_all_at_the_end(executed):
    """Otherwise each batch would add a table, or the table would stay as it was at first."""
    (output,) = executed["begin"]
    for kind in ("text/html", "text/plain"):
        table = output["data"][kind]
        assert table.count("time (UTC)") == 1
        assert table.count("1,234") == 2  # the batch, and the total
    assert executed["run"] == []


def test_a_notebooks_table_says_what_is_unused_below(executed):
    """Otherwise a warning from Spark's thread would be below another cell, or be lost."""
    (output,) = executed["begin"]
    assert "fields that are not used: <run> (they are ignored)" in output["data"]["text/plain"]
    assert "fields that are not used: &lt;run&gt; (they are" in output["data"]["text/html"]


def test_a_notebook_shows_the_last_of_many_batches_and_the_total_of_all(executed):
    """Otherwise a long stream's table would fill the page."""
    (output,) = executed["begin again"]
    lines = output["data"]["text/plain"].splitlines()
    assert len(lines) == 1 + 20 + 2
    assert lines[1].split() == ["00:05:00", "1,000", "500", "0", "0.5", "2,000", "20,000"]
    assert lines[-3].split() == ["00:24:00", "1,000", "500", "0", "0.5", "2,000", "1,000"]
    assert lines[-2].split() == ["total", "25,000", "12,500", "0", "12.5", "2,000"]
    assert lines[-1] == "the last 20 of 25 batches; the total is of all"
    assert output["data"]["text/html"].count("<tr>") == 1 + 20 + 1
    assert executed["add many"] == []


def test_a_notebook_shows_the_plot_once(executed):
    """Otherwise the figure would be there twice, or as text."""
    (output,) = executed["plot"]
    assert "image/png" in output["data"]


def test_a_terminal_gets_aligned_lines(capsys):
    """Otherwise a log could not be read."""
    monitor = Monitor()
    monitor.begin()
    assert capsys.readouterr().out == ""
    monitor.add(Batch(NOON + 1_000, 40_000, 22_221, 0, 0.9, 60_000))
    monitor.add(Batch(NOON + 2_000, 1_040_000, 522_221, 12, 1_000.04))
    monitor.add(Batch(NOON + 3_000, 0, 0, 0, 0.0, 0))
    assert capsys.readouterr().out.splitlines() == [
        "time (UTC)     events     signal      bad  seconds   events/s          lag",
        "12:00:01       40,000     22,221        0      0.9     44,444       60,000",
        "12:00:02    1,040,000    522,221       12  1,000.0      1,040            -",
        "12:00:03            0          0        0      0.0          -            0",
    ]


def test_ipython_in_a_terminal_gets_lines_too():
    """Otherwise it would show a table anew with each batch, as text."""
    source = "from helpers.monitor import *; m = Monitor(); m.begin(); m.add(Batch(0, 1, 1, 0, 1))"
    printed = run_python("-m", "IPython", "--no-banner", "-c", source).stdout
    assert [line.split()[0] for line in printed.splitlines()] == ["time", "00:00:00"]


def test_a_line_is_written_at_once(monkeypatch):
    """Otherwise a log would have the batches only when the program ends."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    monitor_of((10, 5, 1.0, 0))
    assert file.getvalue().count(b"\n") == 2


def test_a_batch_has_what_spark_counted(spark):
    """Otherwise the table would not be what the stream has done."""
    monitor = Monitor()
    monitor.begin(lag=lambda batch_id: batch_id - NOON + 7)
    signal = F.count_if(F.col("id") < 4).alias("signal")
    bad = F.count_if(F.col("id") == 5).alias("bad")
    with monitor.batch(NOON) as counts:
        observe(spark.range(10), counts, signal, bad).collect()
    (batch,) = monitor.batches
    assert batch == Batch(NOON, 10, 4, 1, batch.seconds, lag=7)
    assert batch.seconds > 0


def test_events_are_all_that_must_be_counted(spark):
    """Otherwise a stream without a network could not be watched, nor an empty batch."""
    monitor = Monitor()
    with monitor.batch(NOON) as counts:
        signal = F.sum("id").alias("signal")  # which is null without a row
        observe(spark.range(0), counts, signal).collect()
    (batch,) = monitor.batches
    assert batch == Batch(NOON, 0, 0, 0, batch.seconds, lag=None)


def test_a_batch_that_fails_is_not_counted(spark):
    """Otherwise a batch that is tried again would be counted twice."""
    monitor = Monitor()
    with pytest.raises(RuntimeError, match="the disk is full"), monitor.batch(NOON) as counts:
        observe(spark.range(10), counts).collect()
        raise RuntimeError("the disk is full")
    assert monitor.batches == []
    with monitor.batch(NOON) as counts:
        observe(spark.range(10), counts).collect()
    assert monitor.totals() == {"events": 10, "signal": 0, "bad": 0, "batches": 1}


def test_a_batch_that_is_repeated_is_counted_once():
    """Otherwise what fails after the count would make the totals too large."""
    monitor = monitor_of((10, 5, 1.0, 20), (10, 6, 1.0, 10))
    monitor.add(Batch(NOON, 10, 7, 0, 1.0, 20))
    assert monitor.totals() == {"events": 20, "signal": 13, "bad": 0, "batches": 2}
    assert [batch.batch_id for batch in monitor.batches] == [NOON, NOON + 1_000]


def test_a_long_stream_keeps_the_last_batches_and_the_totals_of_all(capsys, monkeypatch):
    """A stream of a week must not fill the memory, nor a batch take longer for each one before."""
    monkeypatch.setattr(helpers.monitor, "BATCHES_KEPT", 10)
    monitor = Monitor()
    for number in range(25):
        monitor.add(Batch(NOON + number * 1_000, 4, 3, 1, 0.5))
    monitor.add(Batch(NOON + 24_000, 5, 5, 0, 0.5))  # done again
    monitor.add(Batch(NOON + 20_000, 4, 3, 1, 0.5))
    totals = {"events": 101, "signal": 77, "bad": 24, "batches": 25}
    assert monitor.totals() == totals
    assert len(monitor.batches) == len(monitor.table()) == 10
    assert monitor.batches[0].batch_id == NOON + 15_000
    share = monitor.plot().axes[1]
    assert share.lines[0].get_ydata() == pytest.approx([75] * 9 + [100 * 77 / 101])
    assert monitor.plot().axes[2].get_xlabel().endswith("the first batch of the last 10")
    assert "the last 20 of 25 batches; the total is of all" in monitor.contents()["text/plain"]
    monitor.begin()
    assert monitor.totals()["batches"] == 0


def test_a_batch_whose_report_spark_has_dropped_is_counted(spark, capsys):
    """Spark drops reports when there are too many; counts must not wait for them for ever."""
    monitor = Monitor()
    progress = SimpleNamespace(
        batchId=2, timestamp="2024-01-01T12:00:00.000Z", durationMs={"triggerExecution": 250},
        sources=[SimpleNamespace(description="RateStream")],
    )  # fmt: skip
    with monitor.follow(spark):
        for batch_id in (0, 1, 2, 3):
            with monitor.batch(batch_id) as counts:
                observe(spark.range(10), counts).collect()
        monitor.progressed(progress)
        assert [batch.batch_id for batch in monitor.batches] == [0, 1, 2]
        assert [batch.time for batch in monitor.batches] == [NOON] * 3
        assert monitor.batches[2].seconds == 0.25
    assert monitor.totals()["events"] == 30


def test_begin_forgets_earlier_batches(capsys):
    """Otherwise a cell that is run again would add to the totals of its first run."""
    monitor = monitor_of((10, 5, 1.0, 20))
    monitor.begin()
    monitor.add(Batch(NOON + 60_000, 1, 1, 1, 1.0))
    assert monitor.totals() == {"events": 1, "signal": 1, "bad": 1, "batches": 1}
    assert capsys.readouterr().out.count("time (UTC)") == 2


def test_a_batch_without_an_action_is_an_error_in_time(spark, monkeypatch):
    """Otherwise the stream would hang without a word."""
    monkeypatch.setattr(helpers.monitor, "COUNTS_SECONDS", NO_TIME)
    monitor = Monitor()
    with pytest.raises(MonitorError, match="run an action"), monitor.batch(NOON) as counts:
        observe(spark.range(10), counts)
    with pytest.raises(MonitorError, match="and not on its `rdd`"), monitor.batch(NOON) as counts:
        observe(spark.range(10), counts).rdd.count()
    assert monitor.batches == []


def test_a_batch_that_observes_nothing_is_an_error():
    """Otherwise PySpark would say something of NO_OBSERVE_BEFORE_GET."""
    with pytest.raises(MonitorError, match="gives to `observe`"), Monitor().batch(NOON):
        pass


def test_a_batch_whose_rows_no_one_needs_is_an_error(spark):
    """Otherwise the message would be of a null pointer in Java."""
    with pytest.raises(MonitorError, match="`observe` last"), Monitor().batch(NOON) as counts:
        observe(spark.range(10), counts).limit(0).collect()


def test_a_batch_without_events_is_an_error(spark):
    """Otherwise a forgotten alias would be a KeyError without a remedy."""
    with (
        pytest.raises(MonitorError, match=r"no count of events, only of rows: .* F\.count"),
        Monitor().batch(NOON) as counts,
    ):
        observe(spark.range(10), counts, name="rows").collect()


def test_each_unused_field_is_warned_of_once(spark):
    """Otherwise a stream would warn with each batch, or never."""
    monitor = Monitor()

    def run_batch(column):
        with monitor.batch(NOON) as counts:
            observe(spark.range(5), counts, F.collect_set(column).alias("unused")).collect()

    arrays = F.when(F.col("id") > 0, F.array(F.lit("weight"), F.lit("run"), F.lit(None)))
    with pytest.warns(UserWarning) as caught:
        run_batch(arrays)
    (warning,) = caught
    assert str(warning.message) == "fields that are not used: run, weight (they are ignored)"
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match=r"not used: Label \(they"):
        run_batch(F.when(F.col("id") > 2, "Label").otherwise("weight"))
    monitor.begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_batch(arrays)
    assert monitor.totals()["batches"] == 1


def test_the_table_has_times_and_numbers():
    """Otherwise it could not be computed with."""
    table = monitor_of((40, 30, 0.5, None), (10, 5, 0.0, 20)).table()
    times = pd.to_datetime(["2024-01-01 12:00:00", "2024-01-01 12:00:01"], utc=True)
    assert list(table["time"]) == list(times)
    assert table["events"].sum() == 50
    assert table["events_per_second"].iloc[0] == 80
    assert list(table["lag"].isna()) == [True, False]
    assert table["lag"].sum() == 20
    assert dict(table.dtypes) == dict(Monitor().table().dtypes)


def test_the_plot_has_the_batches():
    """Otherwise it would show something else than the table."""
    figure = monitor_of((40, 30, 0.5, 10), (0, 0, 0.1, None), (10, 5, 0.25, 0)).plot()
    events, share, lag, seconds = figure.axes
    assert [bar.get_height() for bar in events.patches] == [40, 0, 10]
    assert [bar.get_center()[0] for bar in events.patches] == pytest.approx([0, 1, 2])
    assert seconds.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.1], [2, 0.25]]
    assert share.lines[0].get_xydata().tolist() == [[0, 75], [1, 75], [2, 70]]
    assert lag.lines[0].get_xydata().tolist() == [[0, 10], [2, 0]]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [
        "events a batch", "signal so far, %", "lag, records", "processing time, seconds"
    ]
    assert lag.get_xlabel() == "seconds since the first batch"
    assert figure.get_figwidth() == 9


@pytest.mark.parametrize("figures", [(0, 0, 0.0, None), (10, 5, 1.0, 0)])
def test_one_batch_can_be_plotted(figures):
    """Otherwise a short stream would end in an error, or in warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = monitor_of(figures).plot()
        figure.savefig(io.BytesIO(), format="png")
    assert plt.get_fignums() == []


def test_without_a_batch_there_is_no_plot():
    """Otherwise it would be empty, or an error of pandas."""
    with pytest.raises(ValueError, match="no batch to plot yet: run the stream first"):
        Monitor().plot()
