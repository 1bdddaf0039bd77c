"""The process that Spark's Python workers are forked from, with Keras already imported.

Importing Keras and TensorFlow takes each process ten seconds and 230 MB. Spark starts a worker per
task slot, and a new one after a failure or an idle minute. Forked from this process, a worker has
both from the start, and shares the memory. `get_spark` names this module in
``spark.python.daemon.module`` on this machine; a cluster's executors use Spark's default.
"""

import gc

import keras  # noqa: F401
from pyspark.daemon import manager

if __name__ == "__main__":
    # A worker collects garbage after each task: half a second for the objects of these modules. In
    # the permanent generation they are left out, and their memory stays shared.
    gc.freeze()
    manager()
