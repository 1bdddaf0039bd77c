"""The monitor: its counts, its display in terminals and notebooks, and its plot."""

import contextlib
import io
import os
import re
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from processes import ROOT, listening, run_python, scraped

from helpers.monitor import Batch, Monitor, log, serve_metrics
from helpers.notebook import recorded, run
from helpers.spark import scratch_folder

NOON = 1_704_110_400_000  # 2024-01-01, 12:00:00 UTC

SETUP = """
import threading
from helpers.monitor import Batch, Monitor
from helpers.spark import get_spark
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream

spark = get_spark(cores=1)
ssc = new_streaming_context(spark, 0.5)
settings = {{"bootstrap.servers": "{servers}", "auto.offset.reset": "earliest"}}
stream = KafkaUtils.createDirectStream(ssc, ["{topic}"], settings)
monitor = Monitor()

def process(df, batch_id):
    monitor.add(Batch(batch_id, df.count(), 0, 0, 0.5, stream.lag_after(batch_id)), ["<run>"])

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


def monitor_of(*figures):
    """Return a monitor of batches one second apart, from events, signal, seconds and lag."""
    monitor = Monitor()
    for number, (events, signal, seconds, lag) in enumerate(figures):
        monitor.add(Batch(NOON + number * 1_000, events, signal, 0, seconds, lag))
    return monitor


@pytest.fixture(scope="module")
def executed(kafka, produce, tmp_path_factory):
    """A notebook's cell outputs: a table that a stream fills, a plot, and another table."""
    kafka.create_topic("monitored", partitions=1)
    produce("monitored", [b"{}"] * 1_234)
    sources = {
        "setup": SETUP.format(servers=kafka.bootstrap_servers, topic="monitored"),
        "begin": "monitor.begin()",
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
    """One table, in the cell that calls `begin`, is updated until the stream ends."""
    (output,) = executed["begin"]
    for kind in ("text/html", "text/plain"):
        table = output["data"][kind]
        assert table.count("time (UTC)") == 1
        assert table.count("1,234") == 2  # the batch, and the total
    assert executed["run"] == []


def test_a_notebooks_table_says_what_is_unused_below(executed):
    """Unused fields are named below the table, escaped in HTML."""
    (output,) = executed["begin"]
    assert "fields that are not used: <run> (they are ignored)" in output["data"]["text/plain"]
    assert "fields that are not used: &lt;run&gt; (they are" in output["data"]["text/html"]


def test_a_notebook_shows_the_last_of_many_batches_and_the_total_of_all(executed):
    """A notebook's table shows the last 20 batches and the total of all."""
    (output,) = executed["begin again"]
    lines = output["data"]["text/plain"].splitlines()
    assert len(lines) == 1 + 20 + 2
    assert lines[1].split() == ["00:05:00", "1,000", "500", "0", "0.5", "2,000", "20,000"]
    assert lines[-3].split() == ["00:24:00", "1,000", "500", "0", "0.5", "2,000", "1,000"]
    assert lines[-2].split() == ["total", "25,000", "12,500", "0", "12.5", "2,000"]
    assert lines[-1] == "the last 20 of 25 batches; the total includes all"
    assert output["data"]["text/html"].count("<tr>") == 1 + 20 + 1
    assert executed["add many"] == []


def test_a_notebook_shows_the_plot_once(executed):
    """A plot is displayed once, as an image."""
    (output,) = executed["plot"]
    assert "image/png" in output["data"]


def test_a_terminal_gets_aligned_lines(capsys):
    """A terminal gets a header and one aligned line per batch."""
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
    """IPython in a terminal prints lines, not a table that is redrawn."""
    source = "from helpers.monitor import *; m = Monitor(); m.begin(); m.add(Batch(0, 1, 1, 0, 1))"
    printed = run_python("-m", "IPython", "--no-banner", "-c", source).stdout
    assert [line.split()[0] for line in printed.splitlines()] == ["time", "00:00:00"]


def test_a_line_is_written_at_once(monkeypatch):
    """Each line is flushed as soon as it is written."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    monitor_of((10, 5, 1.0, 0))
    assert file.getvalue().count(b"\n") == 2


def test_a_batch_that_is_repeated_is_counted_once():
    """A batch that is added again replaces its earlier counts."""
    monitor = monitor_of((10, 5, 1.0, 20), (10, 6, 1.0, 10))
    monitor.add(Batch(NOON, 10, 7, 0, 1.0, 20))
    assert monitor.totals() == {"events": 20, "signal": 13, "bad": 0, "batches": 2}
    assert [batch.batch_id for batch in monitor.batches] == [NOON, NOON + 1_000]


def test_a_long_stream_keeps_the_last_batches_and_the_totals_of_all(capsys, monkeypatch):
    """Only the last batches are kept, but the totals include all."""
    monkeypatch.setattr(log, "BATCHES_KEPT", 10)
    monitor = Monitor()
    for number in range(25):
        monitor.add(Batch(NOON + number * 1_000, 4, 3, 1, 0.5))
    monitor.add(Batch(NOON + 24_000, 5, 5, 0, 0.5))  # a retry
    monitor.add(Batch(NOON + 20_000, 4, 3, 1, 0.5))
    totals = {"events": 101, "signal": 77, "bad": 24, "batches": 25}
    assert monitor.totals() == totals
    assert len(monitor.batches) == len(monitor.table()) == 10
    assert monitor.batches[0].batch_id == NOON + 15_000
    share = monitor.plot().axes[1]
    assert share.lines[0].get_ydata() == pytest.approx([75] * 9 + [100 * 77 / 101])
    assert monitor.plot().axes[2].get_xlabel().endswith("first batch of the last 10 was planned")
    assert "the last 20 of 25 batches; the total includes all" in monitor.contents()["text/plain"]
    monitor.begin()
    assert monitor.totals()["batches"] == 0


def test_a_batch_whose_report_spark_has_dropped_is_counted(spark, capsys):
    """A batch whose progress report Spark drops is counted with the next report."""
    monitor = Monitor()
    progress = SimpleNamespace(
        id="a query", batchId=2, timestamp="2024-01-01T12:00:00.000Z",
        durationMs={"triggerExecution": 250},
    )  # fmt: skip
    with monitor.follow(spark):
        for batch_id in (0, 1, 2, 3):
            monitor.add(Batch(batch_id, 10, 0, 0, 1.0))
        monitor._listener.onQueryProgress(SimpleNamespace(progress=progress))
        assert [batch.batch_id for batch in monitor.batches] == [0, 1, 2]
        assert [batch.time for batch in monitor.batches] == [NOON] * 3
        assert monitor.batches[2].seconds == 0.25
    assert monitor.totals()["events"] == 40  # with the batch whose report has not come


def test_queries_beside_each_other_are_not_mixed_up(spark):
    """A batch gets the figures of its own query, though both have the same numbers."""
    queries = []
    with contextlib.ExitStack() as following:
        for seconds in (0.5, 0.0):
            monitor = Monitor()
            following.enter_context(monitor.follow(spark))
            queries.append((monitor, _numbered_batches(spark, monitor, seconds)))
        for _, query in queries:
            assert query.awaitTermination(300)
        spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty(600_000)  # for late reports
    for monitor, query in queries:
        assert monitor.totals() == {"events": 3, "signal": 0, "bad": 0, "batches": 3}
        reports = {report.batchId: report.durationMs for report in query.recentProgress}
        seconds = {number: each["triggerExecution"] / 1000 for number, each in reports.items()}
        assert {batch.batch_id: batch.seconds for batch in monitor.batches} == seconds


def _numbered_batches(spark, monitor, seconds):
    """Start a query of three batches, each of which takes some time."""
    pause = threading.Event()

    def process(df, batch_id):
        pause.wait(seconds)
        monitor.add(Batch(batch_id, 1, 0, 0, seconds=0.0))

    folder = tempfile.mkdtemp(dir=scratch_folder())
    for number in range(3):
        Path(folder, f"{number}.txt").write_text("one")
    lines = spark.readStream.option("maxFilesPerTrigger", 1).text(folder)
    return lines.writeStream.foreachBatch(process).trigger(availableNow=True).start()


def test_begin_forgets_earlier_batches(capsys):
    """`begin` resets the totals and starts a new table."""
    monitor = monitor_of((10, 5, 1.0, 20))
    monitor.begin()
    monitor.add(Batch(NOON + 60_000, 1, 1, 1, 1.0))
    assert monitor.totals() == {"events": 1, "signal": 1, "bad": 1, "batches": 1}
    assert capsys.readouterr().out.count("time (UTC)") == 2


def test_a_monitor_shows_one_running_stream():
    """Batches of two streams have the same ids, so one would replace the other."""
    monitor, running = Monitor(), [True]
    monitor.begin(lambda: bool(running))
    with pytest.raises(ValueError, match="shows another running stream: use one per stream"):
        monitor.begin(lambda: True)
    running.clear()
    monitor.begin(lambda: True)


def test_each_unused_field_is_warned_of_once():
    """Each unused field is warned about once, even after `begin`."""
    monitor, batch = Monitor(), Batch(NOON, 5, 0, 0, 1.0)
    with pytest.warns(UserWarning) as caught:
        monitor.add(batch, ["weight", "run"])
    (warning,) = caught
    assert str(warning.message) == "fields that are not used: run, weight (they are ignored)"
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match=r"not used: Label \(they"):
        monitor.add(batch, ["Label", "weight"])
    monitor.begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.add(batch, ["run"])
    assert monitor.totals()["batches"] == 1


def test_the_table_has_times_and_numbers():
    """The table has times and numbers, even if it is empty."""
    table = monitor_of((40, 30, 0.5, None), (10, 5, 0.0, 20)).table()
    times = pd.to_datetime(["2024-01-01 12:00:00", "2024-01-01 12:00:01"], utc=True)
    assert list(table["time"]) == list(times)
    assert table["events"].sum() == 50
    assert table["events_per_second"].iloc[0] == 80
    assert list(table["lag"].isna()) == [True, False]
    assert table["lag"].sum() == 20
    assert dict(table.dtypes) == dict(Monitor().table().dtypes)


def test_the_plot_has_the_batches():
    """The plot shows each batch's events, time and lag, and the signal share so far."""
    figure = monitor_of((40, 30, 0.5, 10), (0, 0, 0.1, None), (10, 5, 0.25, 0)).plot()
    events, share, lag, seconds = figure.axes
    assert [bar.get_height() for bar in events.patches] == [40, 0, 10]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in events.patches]
    assert np.allclose(spans, [(0, 0.5), (1, 1.1), (2, 2.25)])
    assert seconds.lines[0].get_xydata().tolist() == [[0.5, 0.5], [1.1, 0.1], [2.25, 0.25]]
    assert share.lines[0].get_xydata().tolist() == [[0.5, 75], [1.1, 75], [2.25, 70]]
    assert lag.lines[0].get_xydata().tolist() == [[0.5, 10], [2.25, 0]]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [
        "events per batch", "signal so far, %", "lag, records", "processing time, seconds"
    ]
    assert lag.get_xlabel() == "seconds since the first batch was planned"
    assert figure.get_figwidth() == 9


def test_the_lag_is_drawn_when_a_batch_is_done():
    """A batch waits for the one before it, so the lag falls later than batches are planned."""
    lag = monitor_of((40, 30, 7.0, 60), (40, 30, 6.0, 20), (20, 10, 3.5, 0)).plot().axes[2]
    assert lag.lines[0].get_xydata().tolist() == [[7, 60], [13, 20], [16.5, 0]]
    assert lag.get_xlim()[1] > 16.5


@pytest.mark.parametrize("figures", [(0, 0, 0.0, None), (10, 5, 1.0, 0)])
def test_one_batch_can_be_plotted(figures):
    """A single batch is plotted without warnings, and the figure is closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = monitor_of(figures).plot()
        figure.savefig(io.BytesIO(), format="png")
    assert plt.get_fignums() == []


def test_without_a_batch_there_is_no_plot():
    """Plotting without batches is refused, and the message says to run the stream first."""
    with pytest.raises(ValueError, match="no batch to plot yet: run the stream first"):
        Monitor().plot()


def test_prometheus_gets_the_figures_of_the_monitor():
    """Totals are counters, times a histogram; the lag is that of the last batch."""
    monitor = monitor_of((40, 30, 0.5, 60), (10, 5, 0.3, 20), (0, 0, 400.0, 20))
    monitor.add(Batch(NOON + 3_000, 7, 2, 3, 1.5, 9))
    versions = ["first"]
    with serve_metrics(monitor, 0, lambda: versions[-1]) as url:
        found = scraped(url)
        assert found["scoring_model_info", "first"] == 1
        versions.append("second")
        assert scraped(url)["scoring_model_info", "second"] == 1
    totals = monitor.totals()
    assert found["scoring_events_total"] == totals["events"] == 57
    assert found["scoring_signal_events_total"] == totals["signal"] == 37
    assert found["scoring_bad_records_total"] == totals["bad"] == 3
    assert found["scoring_batch_seconds_count"] == totals["batches"] == 4
    assert found["scoring_batch_seconds_sum"] == 402.3
    limits = ["0.25", "0.5", "1.0", "2.0", "300.0", "+Inf"]
    assert [found["scoring_batch_seconds_bucket", limit] for limit in limits] == [0, 2, 2, 3, 3, 4]
    assert found["scoring_lag_records"] == 9
    assert found["scoring_last_batch_timestamp_seconds"] == NOON / 1000 + 3


def test_what_is_not_known_is_not_a_metric():
    """Before the first batch and without a model's file, there is no lag, time or version."""
    with serve_metrics(Monitor(), 0) as url:
        names = {name if isinstance(name, str) else name[0] for name in scraped(url)}
    assert names == {
        "scoring_events_total", "scoring_signal_events_total", "scoring_bad_records_total",
        "scoring_batch_seconds_bucket", "scoring_batch_seconds_count", "scoring_batch_seconds_sum",
    }  # fmt: skip


def test_a_machine_without_the_package_for_metrics_is_told_so(monkeypatch):
    """A driver on a cluster's machine may lack it."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(OSError, match="need the package prometheus-client"):
        serve_metrics(Monitor(), 0).__enter__()


def test_a_repeated_batch_is_counted_once_in_metrics():
    """A batch that is added again replaces its figures in the histogram as well."""
    monitor = monitor_of((10, 5, 0.2, 0))
    with serve_metrics(monitor, 0) as url:
        monitor.add(Batch(NOON, 10, 6, 0, 3.0, 0))
        found = scraped(url)
    assert found["scoring_signal_events_total"] == 6
    assert found["scoring_batch_seconds_sum"] == pytest.approx(3)
    assert found["scoring_batch_seconds_bucket", "2.0"] == 0
    assert found["scoring_batch_seconds_count"] == found["scoring_batch_seconds_bucket", "5.0"] == 1


def test_metrics_are_on_loopback_only_and_their_port_is_free_afterwards():
    """A cell that serves metrics can run again on the same port, also after an error."""
    with serve_metrics(Monitor(), 0) as url:
        port = int(url.split(":")[2].split("/")[0])
        addresses = {ip for _, ip, used in listening(psutil.Process(os.getpid())) if used == port}
    assert addresses == {"127.0.0.1"}
    for _ in range(2):
        with pytest.raises(KeyError), serve_metrics(Monitor(), port) as url:
            scraped(url)
            raise KeyError("the cell fails")
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=10)


def test_a_port_that_is_in_use_is_refused_with_the_remedy():
    """Two monitors are served at the same time on two ports, but not on one."""
    one, other = monitor_of((1, 1, 0.5, 0)), monitor_of((2, 2, 0.5, 0))
    with serve_metrics(one, 0) as first, serve_metrics(other, 0) as second:
        assert scraped(first)["scoring_events_total"] == 1
        assert scraped(second)["scoring_events_total"] == 2
        port = int(first.split(":")[2].split("/")[0])
        message = rf"port {port} can't serve the metrics \(Address already in use\): .*another port"
        with pytest.raises(OSError, match=message), serve_metrics(other, port):
            pass
        assert scraped(first)["scoring_events_total"] == 1
    with pytest.raises(OSError, match=r"port 70000 can't serve the metrics .*0-65535"):
        serve_metrics(one, 70_000).__enter__()


def test_metrics_are_whole_while_batches_arrive():
    """Each answer is of one moment: the totals and the histogram have the same batches."""
    monitor, stopping = Monitor(), threading.Event()

    def add():
        number = 0
        while not stopping.is_set():
            monitor.add(Batch(number, 10, 5, 1, 0.05, 0))
            number += 1

    thread = threading.Thread(target=add)
    with serve_metrics(monitor, 0) as url:
        thread.start()
        answers = [scraped(url) for _ in range(20)]
        stopping.set()
        thread.join(30)
    for found in answers:
        batches = found["scoring_batch_seconds_count"]
        assert found["scoring_events_total"] == 10 * batches
        assert found["scoring_batch_seconds_bucket", "0.1"] == batches
    counts = [found["scoring_events_total"] for found in answers]
    assert counts == sorted(counts) and counts[-1] > counts[0]


def test_the_page_on_monitoring_has_the_metrics_that_exist():
    """Each metric is on the page, alerts use no others, and the page's program serves them."""
    page = (ROOT / "docs" / "monitoring.md").read_text()
    with serve_metrics(monitor_of((40, 30, 0.5, 60)), 0, lambda: "first") as url:
        names = {name if isinstance(name, str) else name[0] for name in scraped(url)}
    on_page, served = (
        {re.sub("_(bucket|count|sum)$", "", name) for name in found}
        for found in (re.findall(r"scoring_\w+", page), names)
    )
    assert on_page == served
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program.replace("9400", "0"), {})


def test_on_a_hub_with_a_proxy_the_table_links_to_sparks_page(spark, monkeypatch, tmp_path):
    """The HTML table has a link below the hub's address of this server, and none elsewhere."""
    (tmp_path / "jupyter_server_proxy").mkdir()
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    monkeypatch.syspath_prepend(tmp_path)
    port = spark.sparkContext.uiWebUrl.rpartition(":")[2]
    assert f'href="/user/ada/proxy/{port}/jobs/"' in Monitor().contents()["text/html"]
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX")
    assert "href" not in Monitor().contents()["text/html"]
