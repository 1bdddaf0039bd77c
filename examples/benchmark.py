"""Measure how fast the walkthrough's stream is, against what the processor could do at best.

    python examples/benchmark.py drain

A broker is started on this machine and filled with events. The stream of the walkthrough, with the
notebook's own functions, then drains the topic several times: each time a new consumer group reads
all events, scores them, and writes the scores. Beside it, in the same minutes and on the same
cores, NumPy multiplies matrices: the network is 2.036 million floating-point operations an event,
nearly all of them in matrix products, so that is the limit for any way to run it in this precision.
The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

import keras
import numpy
from pyspark.sql import SparkSession

from helpers.broker import LocalKafka
from helpers.monitor import Monitor
from helpers.notebook import definitions
from helpers.session import get_spark, scratch_folder
from helpers.sinks import ParquetSink
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream

TOPIC = "benchmark"
ROWS = 4_096  # of the matrices, and events in an Arrow batch
SGEMM_SECONDS = 2.0
WARM_UPS = 2  # Java compiles its code while it runs; the third drain is about as fast as the tenth
INTERVAL_SECONDS = 1.0
DRAIN_SECONDS = 600


def limit_events_per_s(model: keras.Model, seconds: float = SGEMM_SECONDS) -> float:
    """Return how many events a second all cores could score if they did nothing but multiply.

    Parameters
    ----------
    model : keras.Model
        A network of dense layers.
    seconds : float
        For how long to measure.

    Returns
    -------
    float
        The speed of NumPy's product of float32 matrices (SGEMM) with the shape of the network's
        largest layer, divided by the network's operations for an event: a multiplication and an
        addition for each parameter.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> limit_events_per_s(build_model(), seconds=0.1) > 0
    True
    """
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    shape = max((tuple(kernel.shape) for kernel in kernels), key=numpy.prod)
    generator = numpy.random.default_rng(0)
    left = generator.random((ROWS, shape[0]), dtype="float32")
    right = generator.random(shape, dtype="float32")
    products = 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        left @ right
        products += 1
    flops = 2 * products * ROWS * shape[0] * shape[1]
    return flops / (time.perf_counter() - started) / (2 * model.count_params())


def drain(
    spark: SparkSession, bootstrap_servers: str, functions: dict[str, Any]
) -> tuple[dict[str, int], float]:
    """Stream the topic from its beginning to its end through the walkthrough's functions.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session.
    bootstrap_servers : str
        The broker's address.
    functions : dict
        What `helpers.notebook.definitions` returns.

    Returns
    -------
    dict of str to int
        The totals of the monitor.
    float
        Seconds from when the first batch was planned to when the last one was committed.
    """
    monitor: Monitor = functions["monitor"]
    sink = functions["sink"] = ParquetSink(spark, f"{scratch_folder()}/scored-{uuid.uuid4()}")
    settings = {
        "bootstrap.servers": bootstrap_servers,
        "group.id": f"benchmark-{uuid.uuid4()}",
        "auto.offset.reset": "earliest",
    }
    ended = 0.0

    def is_drained() -> bool:
        nonlocal ended
        ended = time.time()
        return stream.lag() == 0

    ssc = new_streaming_context(spark, INTERVAL_SECONDS)
    stream = KafkaUtils.createDirectStream(ssc, [TOPIC], settings)
    stream.foreachBatch(functions["process_instances"])
    monitor.begin(lag=stream.lag_after)
    with sink:
        sink.begin(stream.ranges_of)
        run_stream(ssc, until=is_drained, timeout=DRAIN_SECONDS)
    planned = monitor.batches[0].batch_id / 1000
    return monitor.totals(), ended - planned


def measure(events: int, runs: int) -> dict[str, Any]:
    """Return the benchmark's result.

    Parameters
    ----------
    events : int
        How many events the topic holds.
    runs : int
        How many times it is drained, once warm.

    Returns
    -------
    dict
        ``events``, ``cores``, ``limit_events_per_s`` (the median of measurements before and after
        each drain), ``drain_events_per_s`` (``min``, ``median``, ``max``), and ``ratio``: the
        median drain divided by the limit.

    Raises
    ------
    RuntimeError
        If a drain scored another number of events.
    """
    functions = definitions("1_walkthrough", "pipeline")
    functions["monitor"] = Monitor()
    with LocalKafka() as kafka, _stopped_at_the_end(get_spark()) as spark:
        _produce(kafka.bootstrap_servers, events)
        for _ in range(WARM_UPS):
            drain(spark, kafka.bootstrap_servers, functions)
        limits, speeds = [limit_events_per_s(functions["model"])], []
        for _ in range(runs):
            totals, seconds = drain(spark, kafka.bootstrap_servers, functions)
            if totals["events"] != events:
                raise RuntimeError(f"{totals['events']} events were scored, not {events}.")
            speeds.append(events / seconds)
            limits.append(limit_events_per_s(functions["model"]))
    limit, speed = statistics.median(limits), statistics.median(speeds)
    drained = {"min": min(speeds), "median": speed, "max": max(speeds)}
    return {
        "events": events,
        "cores": os.cpu_count(),
        "limit_events_per_s": round(limit),
        "drain_events_per_s": {name: round(value) for name, value in drained.items()},
        "ratio": round(speed / limit, 3),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line says, and return the exit code."""
    options = _options(arguments)
    try:
        # The monitor's lines are for whoever waits; the result alone is for the standard output.
        with contextlib.redirect_stdout(sys.stderr):
            result = measure(options.events, options.runs)
    except (RuntimeError, TimeoutError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 0


@contextlib.contextmanager
def _stopped_at_the_end(spark: SparkSession) -> Iterator[SparkSession]:
    try:
        yield spark
    finally:
        spark.stop()


def _produce(bootstrap_servers: str, events: int) -> None:
    """Fill the topic with the producer that the README shows."""
    program = Path(__file__).resolve().parent / "kafka_producer.py"
    command = [sys.executable, str(program), bootstrap_servers, "--topic", TOPIC]
    subprocess.run([*command, "--events", str(events)], stdout=sys.stderr, check=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["drain"], help="what to measure")
    parser.add_argument("--events", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
