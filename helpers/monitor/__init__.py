"""What a stream does, batch by batch: a table while it runs, and a plot when it is done.

    monitor = Monitor()
    monitor.begin(lag=stream.lag_after)

    def process_instances(df, batch_id):
        with monitor.batch(batch_id) as counts:
            scored = score(df).observe(counts, F.count(F.lit(1)).alias("events"))
            scored.write.parquet(f"scores/batch={batch_id}")

In a notebook the table is below the cell that called `begin`, and changes there with each batch;
elsewhere each batch is a printed line.
"""

from helpers.monitor.log import Batch, Monitor, MonitorError

__all__ = [
    "Batch",
    "Monitor",
    "MonitorError",
]
