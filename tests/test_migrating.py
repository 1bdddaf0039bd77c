"""The migration guide: its code blocks run, one after the other."""

import re

from processes import ROOT

from helpers.broker import count_records
from helpers.streaming import batches, new_streaming_context, run_stream

BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "migrating.md").read_text(), re.DOTALL
)


def test_every_block_of_the_guide_runs(spark, kafka, produce, tmp_path, capsys):
    """Every code block runs as written, and the streams read the whole topic."""
    kafka.create_topic("events", partitions=1)
    if count_records(kafka.bootstrap_servers, "events") == {0: 0}:  # else, an example was faster
        produce("events", [b"%d" % number for number in range(100)])
    ssc = new_streaming_context(spark, 0.5)
    names = {
        "sc": spark.sparkContext, "ssc": ssc, "broker": kafka.bootstrap_servers,
        "checkpoint": str(tmp_path / "checkpoint"), "results": str(tmp_path / "results"),
    }  # fmt: skip
    assert len(BLOCKS) >= 9
    for block in BLOCKS:
        exec(block, names)
    names["stream"].lag()
    streams = batches.batches_of(ssc)
    run_stream(ssc, until=lambda: all(stream.ledger.lag() == 0 for stream in streams), timeout=600)
    printed = capsys.readouterr().out
    total = max(part.untilOffset for part in names["ranges"])
    assert total >= 100
    assert f"{total} records" in printed  # Structured Streaming
    assert printed.splitlines().count("10") == 2  # the RDD, and the DataFrame
    assert spark.read.parquet(*map(str, (tmp_path / "results").iterdir())).count() == total
