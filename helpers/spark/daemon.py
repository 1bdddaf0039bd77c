"""The process that Spark's Python workers are forked from, with Keras already imported.

Importing Keras and TensorFlow costs a process ten seconds and 230 MB. Spark starts a worker for
each task slot, and a new one after a failure or an idle minute. A worker forked from this process
has both modules from the start, and shares their memory. `get_spark` names this module in
``spark.python.daemon.module`` on this machine; a cluster's executors use Spark's default.
"""

import gc

import keras  # noqa: F401
from pyspark.daemon import manager

if __name__ == "__main__":
    # A worker collects garbage after each task, which takes half a second with the objects of these
    # modules. Frozen objects are skipped, and their memory stays shared.
    gc.freeze()
    manager()
