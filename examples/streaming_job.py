r"""Score a Kafka topic into Parquet, each event exactly once: the walkthrough as a program.

    python examples/streaming_job.py --engine structured --bootstrap-servers 127.0.0.1:9092 \
        --topic Machine_Learning --output scored --checkpoint checkpoint

runs until SIGTERM or Ctrl-C, finishes its batch, and exits with code 0. With `--available-now`, it
scores the available records and exits. `spark-submit examples/streaming_job.py ...` takes Spark's
settings from spark-submit. A restarted job resumes after the events in the output. Read the output
with `helpers.sinks.read_scored`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

# First, because it finds the Spark of SPARK_HOME, if that is set.
from helpers.spark import JAVA_ERRORS, JarsError, SessionError, full_path, get_spark, summary

# isort: split
from py4j.java_gateway import JavaObject, JavaPackage
from py4j.protocol import Py4JJavaError
from pyspark.java_gateway import ensure_callback_server_started
from pyspark.sql import DataFrame, SparkSession

from helpers.higgs import EVENT_ID
from helpers.kafka_settings import check_address, config_option, setting_option
from helpers.model import build_model, normalized_network
from helpers.monitor import Monitor, serve_metrics
from helpers.records import parse_events
from helpers.scoring import Score, score_stream
from helpers.serving import ModelFile
from helpers.sinks import ON_BAD_RECORD, ParquetSink, SinkError, prepare_dead_letters
from helpers.streaming import (
    KafkaQuery,
    KafkaUtils,
    StreamError,
    TopicAndPartition,
    java_watched,
    new_streaming_context,
    run_stream,
    topic_ids,
    without_secrets,
)
from helpers.transformers import LabelIndexTransformer, ModelPredictor

# Limits on a batch, per second of the interval: large enough for high throughput, and small enough
# to be scored in about that time.
# spark-submit can override the DStream's limit, spark.streaming.kafka.maxRatePerPartition.
RECORDS_PER_BATCH = 100_000
RECORDS_PER_PARTITION_AND_SECOND = 10_000


def run_dstream(
    spark: SparkSession,
    options: argparse.Namespace,
    sink: ParquetSink,
    score: Score,
    monitor: Monitor,
    stopping: threading.Event,
) -> None:
    """Score with a DStream, which resumes at the end of the output and needs no checkpoint."""
    interval = min(options.interval, 1.0) if options.available_now else options.interval
    ssc = new_streaming_context(spark, interval)
    stream = KafkaUtils.createDirectStream(
        ssc, [options.topic], kafka_settings(options), positions=ends(spark, options, sink)
    )
    available = stream.ends()
    score_stream(stream, score, sink, monitor)

    def is_over() -> bool:
        if stopping.is_set() or not options.available_now:
            return stopping.is_set()
        return stream.has_done(available)

    run_stream(ssc, until=is_over, timeout=math.inf)


def run_structured(
    spark: SparkSession,
    options: argparse.Namespace,
    sink: ParquetSink,
    score: Score,
    monitor: Monitor,
    stopping: threading.Event,
) -> None:
    """Score with Structured Streaming, which keeps its progress in the checkpoint."""
    positions = ends(spark, options, sink)
    interval = None if options.available_now else options.interval
    most = round(RECORDS_PER_BATCH * max(1, interval or 1))  # Spark runs one batch per interval
    query = KafkaQuery(
        spark, [options.topic], kafka_settings(options), options.checkpoint, positions, most
    )
    with query, monitor.follow(spark):
        score_stream(query, score, sink, monitor)
        query.run(until=stopping.is_set, interval=interval)


def ends(
    spark: SparkSession, options: argparse.Namespace, sink: ParquetSink
) -> dict[TopicAndPartition, int]:
    """Return the offsets at which the output ends and a stream resumes."""
    return sink.positions(topic_ids(spark, [options.topic], kafka_settings(options)))


def score_with_file(file: ModelFile) -> Score:
    """Return a function that scores each batch with the serving model currently in the file."""

    def score(records: DataFrame) -> DataFrame:
        serving = file.current()
        return serving.transform(parse_events(records, serving.model.schema))

    return score


def score_as_walkthrough() -> Score:
    """Return a function that scores records with the walkthrough's random network."""
    model = normalized_network(build_model())
    predictor = ModelPredictor(keras_model=model, features_col="event")
    label_indexer = LabelIndexTransformer(output_dim=2)

    def score(records: DataFrame) -> DataFrame:
        return label_indexer.transform(predictor.predict(parse_events(records)))

    return score


def kafka_settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings for Kafka clients.

    Examples
    --------
    >>> kafka_settings(parse_arguments(
    ...     "--bootstrap-servers h:9092 --topic t --output o --checkpoint c "
    ...     "--kafka-option group.id=g".split()))
    {'auto.offset.reset': 'earliest', 'isolation.level': 'read_committed', 'group.id': 'g',
     'bootstrap.servers': 'h:9092'}
    """
    return {
        # Don't score records of aborted transactions, such as those of an interrupted replay.
        "auto.offset.reset": "earliest", "isolation.level": "read_committed",
        **options.kafka_config, **dict(options.kafka_option),
        "bootstrap.servers": options.bootstrap_servers,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the job, and return its exit code."""
    options = parse_arguments(arguments)
    stopping = threading.Event()
    stop_at_signals(stopping)
    try:
        check_address(options.bootstrap_servers)
        with java_watched():
            run(options, stopping)
    except (JarsError, SessionError, SinkError, StreamError, OSError, ValueError) as error:
        return fail(str(error))
    except JAVA_ERRORS as error:
        return fail(without_secrets(summary(error), kafka_settings(options)))
    return 0


def run(options: argparse.Namespace, stopping: threading.Event) -> None:
    """Start Spark, and score until the job must stop or has nothing left to do."""
    score, event_id, signal_index, version = score_as_walkthrough(), EVENT_ID, 0, None
    if options.model:
        file = ModelFile(options.model)
        contract = file.model.contract  # new versions must have the same id and signal
        score, event_id = score_with_file(file), contract.event_id
        signal_index, version = contract.signal_index, lambda: file.model.version
    rate = {"spark.streaming.kafka.maxRatePerPartition": RECORDS_PER_PARTITION_AND_SECOND}
    monitor = Monitor()
    with contextlib.ExitStack() as stack:
        stack.enter_context(metrics(options, monitor, version))
        spark = get_spark("Streaming job", config=rate)
        stack.callback(spark.stop)
        stop_at_signals(stopping)  # again, because PySpark installs its own handler for Ctrl-C
        stop_at_signals_to_java(spark, stopping)
        full_path(spark, options.output)  # raises if Spark has no file system for it
        settings = kafka_settings(options)
        if options.on_bad_record == "dead-letter":
            prepare_dead_letters(spark, [options.topic], settings)
        with ParquetSink(
            spark, options.output, signal_index=signal_index, event_id=event_id,
            on_bad_record=options.on_bad_record, settings=settings,
            from_beginning=options.from_beginning,
        ) as sink:
            run_engine = run_dstream if options.engine == "dstream" else run_structured
            run_engine(spark, options, sink, score, monitor, stopping)


def metrics(
    options: argparse.Namespace, monitor: Monitor, version: Callable[[], str] | None
) -> contextlib.AbstractContextManager:
    """Return a context in which the metrics are served, if there is a port for them."""
    if options.metrics_port is None:
        return contextlib.nullcontext()
    return serve_metrics(monitor, options.metrics_port, version)


def stop_at_signals(stopping: threading.Event) -> None:
    """Make SIGTERM and Ctrl-C request a stop after the current batch; the next one ends at once."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        stopping.set()

    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, stop)


def stop_at_signals_to_java(spark: SparkSession, stopping: threading.Event) -> None:
    """Make the signals that Java receives also request a stop, instead of ending Java.

    spark-submit is Java, and so is the container of a driver on YARN; this program is their child.
    """
    ensure_callback_server_started(spark.sparkContext._gateway)
    java = spark._jvm.sun.misc
    for name in ("TERM", "INT"):
        with contextlib.suppress(Py4JJavaError):  # Java was started with -Xrs: it takes no signals
            java.Signal.handle(java.Signal(name), _SignalHandler(java, stopping))


class _SignalHandler:
    """Implements ``sun.misc.SignalHandler``."""

    def __init__(self, java: JavaPackage, stopping: threading.Event) -> None:
        self._java, self._stopping = java, stopping

    def handle(self, received: JavaObject) -> None:
        """Request a stop."""
        self._java.Signal.handle(received, self._java.SignalHandler.SIG_DFL)
        self._stopping.set()

    class Java:
        """The interface, for py4j."""

        implements = ("sun.misc.SignalHandler",)


def fail(reason: str) -> int:
    """Print why the job failed, and return its exit code."""
    print(f"streaming_job.py: {reason}", file=sys.stderr)
    return 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with an error message if they are invalid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=("dstream", "structured"), default="structured",
        help="Spark's streaming engine; default: %(default)s")  # fmt: skip
    add("--bootstrap-servers", required=True, metavar="HOST:PORT", help="the Kafka brokers")
    add("--topic", required=True, help="the topic with the events")
    add("--output", required=True, metavar="PATH", help="where to write the scored events")
    add("--checkpoint", metavar="PATH",
        help="where Spark keeps its progress; only for --engine structured, because a DStream "
        "resumes at the end of the output")  # fmt: skip
    add("--model", metavar="PATH",
        help="a file written by helpers.serving.save_serving_model; it may be replaced while the "
        "job runs; default: the walkthrough's random network")  # fmt: skip
    add("--interval", type=_seconds, default=1.0, metavar="S",
        help="seconds between batches; default: %(default)s")  # fmt: skip
    add("--available-now", action="store_true", help="score the available records, and exit")
    add("--from-beginning", action="store_true",
        help="if the topic was deleted and created again, add its new events to the same output "
        "instead of refusing them")  # fmt: skip
    add("--on-bad-record", choices=ON_BAD_RECORD, default="dead-letter",
        help="what to do with records that are not events; default: %(default)s")  # fmt: skip
    add("--metrics-port", type=_port, metavar="PORT",
        help="serve the monitor's figures to Prometheus at http://127.0.0.1:PORT/metrics"
        )  # fmt: skip
    add("--kafka-config", default={}, metavar="FILE", type=config_option,
        help="settings for Kafka clients, including passwords, in Kafka's properties format"
        )  # fmt: skip
    add("--kafka-option", action="append", default=[], metavar="K=V", type=setting_option,
        help="another setting, such as client.id=scoring; may be repeated"
        )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.engine == "structured" and not options.checkpoint:
        parser.error("--engine structured needs a --checkpoint")
    return options


def _port(text: str) -> int:
    number = int(text)
    if not 0 < number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a port between 1 and 65535")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0.001 <= number <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.001 and 86,400")
    return number


if __name__ == "__main__":
    sys.exit(main())
