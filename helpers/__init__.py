"""The package behind the notebooks: one room, a module or subpackage, per topic.

The table lists them bottom-up: a room imports only from the rooms above it.

| room | what it holds |
|---|---|
| `kafka_settings` | settings for Kafka clients, and which of them are secret |
| `spark` | the Spark session, jars, files on Spark's file systems |
| `higgs` | the events: their columns, their files, a generator |
| `model` | the network: build it, send it to workers as bytes, call it |
| `broker` | a real Kafka broker on this machine |
| `preflight` | the requirements of a run, each with the command that provides it |
| `streaming` | Kafka as a DStream and as a Structured Streaming query |
| `records` | parsing bytes into events, and what makes a record valid |
| `transformers` | the network as a Spark ML stage |
| `sinks` | storing each scored event exactly once |
| `serving` | saving a trained network to a file, and serving it |
| `training` | training a network on a Spark DataFrame |
| `monitor` | a stream's batches as a live table, a plot and metrics |
| `scoring` | the one place that joins a stream, a scoring function, a sink and a monitor |
| `notebook` | running a notebook from the command line |

A subpackage's ``__init__`` exports the names that other rooms may import.
"""

import os as _os
import sys as _sys
from pathlib import Path as _Path

# Keras reads these variables when it is imported, also on the workers, so they are set here.
# TensorFlow is the only backend that the kit installs. Its oneDNN kernels are not faster for this
# network, their rounding depends on the processor, and they print messages into notebook cells.
_os.environ.setdefault("KERAS_BACKEND", "tensorflow")
_os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
_os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# On SWAN or a cluster's edge node, SPARK_HOME points to the site's Spark. findspark puts it first
# on sys.path, and must do so before anything, including this package, imports pyspark.
if "pyspark" not in _sys.modules and (
    _Path(_os.environ.get("SPARK_HOME") or "/nowhere") / "python" / "pyspark"
).is_dir():
    import findspark

    findspark.init()
