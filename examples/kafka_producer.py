"""Fill a Kafka topic with Higgs events: one JSON object per event, keyed by its EventId.

    python examples/kafka_producer.py 127.0.0.1:9092 --events 200000
    python examples/kafka_producer.py 127.0.0.1:9092 --csv atlas-higgs-challenge-2014-v2.csv.gz

Events that Kafka doesn't acknowledge are reported as soon as they fail, and counted at the end; the
exit code is then 1. With `--loop`, the program survives broker outages. On Ctrl-C or SIGTERM, it
waits for the outcome of the events already sent, and exits.

The events are generated, or read from a CSV file of the ATLAS Higgs challenge. The bookkeeping
columns (Label, Weight, ...) are not sent: the label is what a network has to predict.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kafka.codec
import orjson
import pandas as pd
from kafka import KafkaProducer
from kafka.errors import IllegalStateError, KafkaError
from kafka.producer.future import FutureRecordMetadata
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

from helpers.broker import CONNECT_TIME_OUT, BrokerError, abandon, connecting, python_settings
from helpers.higgs import EVENT_ID, FEATURES, generate_events, read_events
from helpers.kafka_settings import ANSWER_SECONDS, check_address, config_option

CODECS = ("none", "gzip", "lz4", "snappy", "zstd")
DEFAULT_BROKER = "127.0.0.1:9092"
FIRST_EVENT_ID = 100_000  # as in the challenge's file
CHUNK = 10_000  # events generated or encoded at a time, to limit memory
DELIVERY_SECONDS = 30
LOOP_DELIVERY_SECONDS = 600  # an endless producer waits for its broker
STALLED_SECONDS = 2  # how much later than the time-out an outcome may arrive
STOP_SECONDS = 10  # how long to wait for the last events after Ctrl-C
REPORT_SECONDS = 5  # between two error reports
MOST_ON_THE_WAY = 100_000  # maximum number of events without an outcome, to limit memory
MOST_LATE = 0.1  # seconds of a delay that the events after it make up for


class ProducerError(RuntimeError):
    """Some or all events could not be produced; the message says why and what to do."""


class Deliveries:
    """Counts the outcomes of the events sent: acknowledged or failed.

    Failures and missing answers are reported on stderr: at once, and then every few seconds.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.failed = 0
        self.error: Exception | str = "no answer"  # why the last event failed
        self._settled_at = time.monotonic()  # last outcome, or last time with nothing to wait for
        self._failing_since: float | None = None
        self._lock = threading.Lock()  # outcomes arrive in the client's thread and in this one
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def watch(self, future: FutureRecordMetadata) -> None:
        """Count an event once its outcome is known."""
        if not self.on_the_way():
            self._settled_at = time.monotonic()
        self.sent += 1
        future.add_callback(self._succeed)
        future.add_errback(self._fail)

    def refuse(self, error: Exception) -> None:
        """Count an event that the client did not accept."""
        self.sent += 1
        self._fail(error)

    def on_the_way(self) -> int:
        """Return how many events have no outcome yet."""
        return self.sent - self.acknowledged - self.failed

    def silence(self) -> float:
        """Return for how many seconds sent events have been waiting without any outcome."""
        return time.monotonic() - self._settled_at if self.on_the_way() else 0

    def failing(self) -> float:
        """Return for how many seconds events have failed and none was acknowledged."""
        since = self._failing_since
        return 0 if since is None else time.monotonic() - since

    def begin_again(self) -> None:
        """Reset the time of the first failure for a new producer; keep the counts."""
        self._failing_since = None

    def _succeed(self, _: object) -> None:
        with self._lock:
            self.acknowledged += 1
            self._failing_since = None
            self._settled_at = time.monotonic()

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self.failed += 1
            self._failing_since = self._failing_since or time.monotonic()
            if not isinstance(error, IllegalStateError):  # from a closed producer
                self.error = error
            self._settled_at = time.monotonic()

    def _report(self) -> None:
        reported = 0
        while True:
            time.sleep(0.2)
            if self.failed > reported:
                reported = self.failed
                text = f"{reported} events failed so far: {self.error}"
            elif self.silence() > REPORT_SECONDS:
                text = f"no answer for {self.silence():.0f} s; {self.on_the_way()} events wait"
            else:
                continue
            tqdm.write(text, file=sys.stderr)
            time.sleep(REPORT_SECONDS)


class Stopping:
    """Set by Ctrl-C and SIGTERM; the second one raises `KeyboardInterrupt`.

    It is not a `threading.Event`: a handler that sets one waits for ever if the signal comes
    while the program waits for that event.

    Attributes
    ----------
    exit_code : int
        The exit code of a program that the signal ends.
    """

    def __init__(self) -> None:
        self.exit_code, self._is_set = 0, False
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, self._stop)

    def is_set(self) -> bool:
        """Return whether the program must stop."""
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Wait, at most until the program must stop; return whether it must."""
        deadline = time.monotonic() + seconds
        while not self._is_set and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
        return self._is_set

    def _stop(self, number: int, _: object) -> None:
        if self._is_set:
            raise KeyboardInterrupt
        self.exit_code, self._is_set = 128 + number, True


def encode(events: pd.DataFrame) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key (EventId) and value (JSON of the id and 30 features) of each event.

    Parameters
    ----------
    events : pandas.DataFrame
        Events with the columns of the challenge; only EventId and the features are used.

    Yields
    ------
    tuple of bytes
        Key and value. Whole-number columns become JSON integers.

    Examples
    --------
    >>> key, value = next(encode(generate_events(1, seed=1)))
    >>> orjson.loads(value)["EventId"] == int(key)
    True
    """
    names = (EVENT_ID, *FEATURES)
    for row in zip(*(events[name].tolist() for name in names), strict=True):
        yield str(row[0]).encode(), orjson.dumps(dict(zip(names, row, strict=True)))


def chunks(options: argparse.Namespace, stopping: Stopping) -> Iterator[pd.DataFrame]:
    """Yield the events to send, chunk by chunk; with ``--loop``, round after round.

    Generated rounds continue with new events and new EventIds; a file's rounds repeat its events.
    """
    for round_number in itertools.count():
        if options.csv:
            yield from _file_chunks(options)
        else:
            yield from _generated_chunks(options, round_number)
        if not options.loop or stopping.wait(options.pause):
            return


def connect(options: argparse.Namespace) -> KafkaProducer:
    """Return a producer whose events arrive exactly once, on all replicas, or are reported.

    Parameters
    ----------
    options : argparse.Namespace
        Has ``bootstrap_servers``, ``compression`` (one of `CODECS`, or None) and ``kafka_config``
        (settings by Kafka's names).

    Raises
    ------
    ProducerError
        If no broker answers within 15 s, Kafka refuses the client, or the codec isn't installed.
    ValueError
        If the address has no port, or kafka-python doesn't know a setting.
    """
    servers = options.bootstrap_servers
    check_address(servers)
    given = {"compression.type": "lz4", **options.kafka_config, "bootstrap.servers": servers}
    given["compression.type"] = codec = options.compression or given["compression.type"]
    if codec != "none" and not getattr(kafka.codec, f"has_{codec}", lambda: True)():
        raise ProducerError(
            f"the codec {codec} is not installed: pip install 'kafka-python[{codec}]', "
            "or choose another --compression."
        )
    defaults = {
        "acks": "all",
        "enable_idempotence": True,
        # Large batches raise the throughput from 13,000 to 37,000 events/s.
        "batch_size": 2**20,
        "linger_ms": 200,
        "max_block_ms": ANSWER_SECONDS * 1000,
        "request_timeout_ms": DELIVERY_SECONDS * 1000 // 2,
        "delivery_timeout_ms": 1000 * (LOOP_DELIVERY_SECONDS if options.loop else DELIVERY_SECONDS),
        "reconnect_backoff_max_ms": 1000,
        **CONNECT_TIME_OUT,
    }
    given = {**defaults, **python_settings(given, KafkaProducer)}
    # kafka-python refuses a time for a delivery that is shorter than that for a request.
    least = given["linger_ms"] + given["request_timeout_ms"]
    given["delivery_timeout_ms"] = max(given["delivery_timeout_ms"], least)
    try:
        with connecting(servers):
            return KafkaProducer(**given)
    except BrokerError as error:
        raise ProducerError(str(error)) from None


class Sender:
    """A producer that is replaced, with ``--loop``, when it stops getting answers.

    Parameters
    ----------
    options : argparse.Namespace
        As for `connect`, and with ``topic`` and ``loop``.
    deliveries : Deliveries
        Counts the outcomes of the events.
    stopping : Stopping
        Set when the program must stop.

    Raises
    ------
    ProducerError
        See `connect`.
    """

    def __init__(
        self, options: argparse.Namespace, deliveries: Deliveries, stopping: Stopping
    ) -> None:
        self._options, self._deliveries, self._stopping = options, deliveries, stopping
        self._producer = connect(options)
        # A working Kafka client reports an event as lost after this time.
        self._patience = self._producer.config["delivery_timeout_ms"] / 1000 + STALLED_SECONDS

    def send(self, key: bytes, value: bytes) -> None:
        """Send an event, as soon as few enough others wait for their outcome.

        Raises
        ------
        ProducerError
            If the topic can't be written to; with ``--loop``, only if no event was sent before.
        """
        while self._deliveries.on_the_way() >= MOST_ON_THE_WAY or self._is_broken():
            if self._stopping.wait(0.01):
                return
            if self._is_broken():
                self._replace()
        topic = self._options.topic
        try:
            self._deliveries.watch(self._producer.send(topic, key=key, value=value))
        except KafkaError as error:
            works = self._deliveries.sent > 0
            if works:
                self._deliveries.refuse(error)
            if not works or not self._options.loop:
                raise ProducerError(
                    f"can't write to topic {topic}: {error}. Check that it exists and may be "
                    "written to."
                ) from error

    def close(self) -> None:
        """Wait for the outcome of every event; after the time-out, the others have failed."""
        seconds = STOP_SECONDS if self._stopping.is_set() else self._patience
        deadline = time.monotonic() + seconds
        try:
            # `flush` only makes sure that everything has been sent: it doesn't wait for batches
            # that are too large for the broker, and are split and sent again.
            with contextlib.suppress(KafkaError):
                self._producer.flush(timeout=seconds)
            while self._deliveries.on_the_way() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            abandon(self._producer)

    def _is_broken(self) -> bool:
        """Return whether acknowledgements have stopped, whatever the reason."""
        is_failing = self._options.loop and self._deliveries.failing() > REPORT_SECONDS
        return is_failing or self._deliveries.silence() > self._patience

    def _replace(self) -> None:
        """Connect a new producer, because kafka-python's idempotent producer doesn't recover."""
        if not self._options.loop:
            raise ProducerError(f"no answer from Kafka for {self._deliveries.silence():.0f} s")
        abandon(self._producer)
        while not self._stopping.is_set():
            with contextlib.suppress(ProducerError):
                self._producer = connect(self._options)
                self._deliveries.begin_again()
                return


def produce(options: argparse.Namespace, sender: Sender, stopping: Stopping) -> None:
    """Send all events, unless the program must stop."""
    pace = _pace(options.rate, stopping)
    total = None if options.loop or options.csv else options.events
    with tqdm(total=total, unit=" events", unit_scale=True, disable=None) as bar:
        for events in chunks(options, stopping):
            for key, value in encode(events):
                pace()
                if stopping.is_set():
                    return
                sender.send(key, value)
            bar.update(len(events))


def main(arguments: list[str] | None = None) -> int:
    """Produce according to the command line, and return the exit code."""
    options = _options(arguments)
    stopping, deliveries = Stopping(), Deliveries()
    started = time.monotonic()
    try:
        sender = Sender(options, deliveries, stopping)
        try:
            produce(options, sender, stopping)
        finally:
            sender.close()
    except (ProducerError, ValueError, OSError, EOFError) as error:
        print(error, file=sys.stderr)
        if not deliveries.sent:
            return 1
        stopping.exit_code = 1
    except KeyboardInterrupt:
        print("interrupted again: events without an outcome have failed", file=sys.stderr)
    return _summary(deliveries, options.topic, time.monotonic() - started) or stopping.exit_code


def _summary(deliveries: Deliveries, topic: str, seconds: float) -> int:
    """Print the outcomes of the events; return 1 if some were not acknowledged, otherwise 0."""
    print(
        f"{deliveries.acknowledged} events acknowledged by {topic} in {seconds:.1f} s "
        f"({deliveries.acknowledged / seconds:,.0f} events/s)"
    )
    if deliveries.failed:
        print(f"{deliveries.failed} events failed: {deliveries.error}", file=sys.stderr)
    return 1 if deliveries.acknowledged < deliveries.sent else 0


def _generated_chunks(options: argparse.Namespace, round_number: int) -> Iterator[pd.DataFrame]:
    """Yield a round's generated events; the first n for a seed don't depend on their number."""
    for first in range(0, options.events, CHUNK):
        chunk = generate_events(
            CHUNK,
            seed=(options.seed, round_number, first // CHUNK),
            first_event_id=FIRST_EVENT_ID + round_number * options.events + first,
        )
        yield chunk.head(options.events - first)


def _file_chunks(options: argparse.Namespace) -> Iterator[pd.DataFrame]:
    events = read_events(options.csv)
    if options.events is not None:
        events = events.head(options.events)
    if events.empty:
        raise ProducerError(f"{options.csv} has no events: give another file.")
    for first in range(0, len(events), CHUNK):
        yield events.iloc[first : first + CHUNK]


def _pace(rate: float | None, stopping: Stopping) -> Callable[[], None]:
    """Return a function that waits as the rate requires; call it before each event.

    Events that are late, after a pause or without a broker, follow at the rate and not at once.
    """
    due = time.monotonic()

    def wait() -> None:
        nonlocal due
        now = time.monotonic()
        due = max(due + 1 / rate, now - MOST_LATE)
        if due > now:
            stopping.wait(due - now)

    return wait if rate else lambda: None


def _number(kind: type, least: float, most: float = 1e9) -> Callable[[str], float]:
    """Return a converter for argparse that accepts only numbers from `least` to `most`."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most:,.0f}")
        return value

    return number


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bootstrap_servers", nargs="?", metavar="host:port",
        help="a Kafka broker, or several separated by commas; default: the bootstrap.servers of "
        f"--kafka-config, otherwise {DEFAULT_BROKER}",
    )
    parser.add_argument("--topic", default="Machine_Learning", help="default: %(default)s")
    parser.add_argument(
        "--events", type=_number(int, 1), help="how many; default: 100000, or the whole file"
    )
    parser.add_argument(
        "--seed", type=_number(int, 0, 2**63), default=0,
        help="seed of generated events; default: 0",
    )  # fmt: skip
    parser.add_argument("--csv", help="send the events of the challenge's file (.csv or .csv.gz)")
    parser.add_argument(
        "--rate", type=_number(float, 0.001), help="events per second; default: full speed"
    )
    parser.add_argument("--compression", choices=CODECS, help="default: lz4")
    parser.add_argument(
        "--kafka-config", default={}, metavar="FILE", type=config_option,
        help="settings for Kafka clients, including passwords, in Kafka's properties format",
    )  # fmt: skip
    parser.add_argument("--loop", action="store_true", help="start over at the end, until Ctrl-C")
    parser.add_argument(
        "--pause", type=_number(float, 0, 86_400), default=0,
        help="seconds between rounds; default: 0",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.bootstrap_servers is None:
        options.bootstrap_servers = options.kafka_config.get("bootstrap.servers", DEFAULT_BROKER)
    if options.events is None and not options.csv:
        options.events = 100_000
    return options


if __name__ == "__main__":
    sys.exit(main())
