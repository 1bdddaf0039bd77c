"""The module behind the notebooks: a dozen rooms, each a word of the tutorial.

From the bottom up; a room imports only from rooms above it in this table:

| room | what it holds |
|---|---|
| `higgs` | the events: their columns, their files, a generator |
| `model` | the network: built, sent to workers as bytes, called |
| `kafka_settings` | the settings of Kafka's clients, and which of them are secret |
| `spark` | the Spark session, Java's jars, files on Spark's file systems |
| `broker` | a real Kafka broker on this machine |
| `preflight` | what a run needs, each with the command that provides it |
| `streaming` | Kafka as a DStream and as a Structured Streaming query |
| `records` | bytes to events, and what a good record is |
| `transformers` | the network as a Spark ML stage |
| `sinks` | scored events, each stored once |
| `serving` | the file of a trained network, and serving it |
| `training` | a network learns from a Spark DataFrame |
| `monitor` | a stream's batches as a live table and a plot |
| `scoring` | the one place that joins a stream, a function, a sink and a monitor |
| `notebook` | a notebook run from the command line |

A room that is a package shows in its ``__init__`` what the others may import from it.
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
