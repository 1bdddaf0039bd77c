"""The process that Spark's Python workers are forked from, with Keras already imported.

Importing Keras and TensorFlow costs a process nine seconds and 230 MB. Spark starts a worker for
each task slot, and a new one after a failure or an idle minute. A worker forked from this process
has both modules from the start, and shares their memory. `get_spark` names this module in
``spark.python.daemon.module`` on this machine; a cluster's executors use Spark's default.
"""

import gc
import sys

from pyspark.daemon import manager

# Keras imports these where it finds them, for wrappers and plots that no worker uses: another three
# seconds. A worker that needs one of them can still import it.
_UNUSED = ("IPython", "matplotlib", "sklearn")

if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(_UNUSED))  # None: an import raises ImportError
    import keras  # noqa: F401

    for name in _UNUSED:
        del sys.modules[name]
    # A worker collects garbage after each task, which takes half a second with the objects of these
    # modules. Frozen objects are skipped, and their memory stays shared.
    gc.freeze()
    manager()
