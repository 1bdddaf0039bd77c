"""What a stream does, batch by batch: a table while it runs, and a plot when it is done.

    monitor = Monitor()
    score_stream(stream, process_instances, sink, monitor)

In a notebook the table is below the cell that called `begin`, and changes there with each batch;
elsewhere each batch is a printed line.
"""

from helpers.monitor.batch import Batch
from helpers.monitor.log import Monitor
