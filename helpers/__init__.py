"""The module behind the notebooks: one concept a file, each usable on its own.

From the bottom up: `higgs` (the events), `model` (the network), `jars` (what Java needs),
`security` (what a secured Kafka needs), `broker` (Apache Kafka on this machine), `checks` (what a
run needs), `session` (Spark), `files` (small files on Spark's file systems), `streaming` (Kafka as
a DStream), `records` (JSON to columns), `transformers` (the network as a Spark ML stage),
`training_task` and `training` (a network learns from a Spark DataFrame), `serving` (a trained
network in a stream), `sinks` (where scored events go), `monitor` (a stream's batches as a live
table) and `notebook` (a notebook run from the command line). A file imports only from those named
before it.
"""

import os as _os
import sys as _sys
from pathlib import Path as _Path

# Here, because it must be set before anything imports Keras, on the workers too. TensorFlow is the
# engine (the kit installs no other). Its oneDNN kernels are no faster for this network and round
# differently from one processor to the next; without them it also keeps its notes about the
# processor out of a notebook's cells.
_os.environ.setdefault("KERAS_BACKEND", "tensorflow")
_os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
_os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# On SWAN or a cluster's edge node SPARK_HOME names the site's Spark. findspark puts it first, which
# has to happen before anything imports pyspark; each module of this package may.
if "pyspark" not in _sys.modules and (
    _Path(_os.environ.get("SPARK_HOME") or "/nowhere") / "python" / "pyspark"
).is_dir():
    import findspark

    findspark.init()
