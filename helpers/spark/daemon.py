"""The process that Spark's Python workers are forked from, with their modules already imported.

Importing Keras and TensorFlow costs a process four seconds and 230 MB. Spark starts a worker for
each task slot, and a new one after a failure or an idle minute. A worker forked from this process
has all modules from the start, and shares their memory. `get_spark` names this module in
``spark.python.daemon.module`` on this machine; a cluster's executors use Spark's default.
"""

import gc
import os
import sys

from pyspark.daemon import manager

# Keras imports these where it finds them, to wrap scikit-learn and to plot: another 1.5 s.
# Workers don't have these two; a function that needs one of the packages can still import it.
_UNUSED = ("IPython", "matplotlib", "sklearn")


def _import_keras() -> None:
    """Import Keras without what it doesn't need."""
    unused = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(unused))  # None: an import raises ImportError
    import keras  # noqa: F401

    for name in unused:
        del sys.modules[name]


if __name__ == "__main__":
    import pyspark.worker  # noqa: F401

    import helpers.serving
    import helpers.transformers  # noqa: F401

    # Spark has separate daemons for functions on DataFrames and on RDDs. It sets this variable for
    # the former only. The latter seldom run a network, and import Keras when they do.
    if "SPARK_SIMPLIFIED_TRACEBACK" in os.environ:
        _import_keras()
    # A worker collects garbage after each task, which takes half a second with the objects of these
    # modules. Frozen objects are skipped, and their memory stays shared.
    gc.freeze()
    manager()
