"""Monitor a stream batch by batch: a live table while it runs, and a plot afterwards.

    monitor = Monitor()
    score_stream(stream, process_instances, sink, monitor)

In a notebook, the table is displayed below the cell that called `score_stream` or `follow`, and
updated with each batch; elsewhere, a line is printed per batch. On a JupyterHub with
``jupyter-server-proxy``, a link below the table leads to Spark's web page.

`display` has a batch's numbers and displays them, `log` keeps and sums them, `plots` draws them,
`metrics` serves them to Prometheus, and `listener` takes the numbers from Spark's reports on a
query.
"""

from helpers.monitor.display import Batch
from helpers.monitor.log import Monitor
from helpers.monitor.metrics import serve_metrics
