"""Fill a Kafka topic with Higgs events: one JSON object an event, keyed by its EventId.

    python examples/kafka_producer.py 127.0.0.1:9092 --events 200000
    python examples/kafka_producer.py 127.0.0.1:9092 --csv atlas-higgs-challenge-2014-v2.csv.gz

Events that Kafka doesn't acknowledge are reported when that is known, and counted at the end; then
the exit code is 1. With `--loop` the program outlasts a broker that is away. Ctrl-C and SIGTERM end
it when what was sent is settled.

The events are generated, or read from a CSV file of the ATLAS Higgs challenge. The challenge's
bookkeeping (Label, Weight, ...) stays behind: it is what a network is to find out.
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
from kafka.errors import (
    IllegalStateError,
    KafkaConfigurationError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
)
from kafka.producer.future import FutureRecordMetadata
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

from helpers.broker import python_settings
from helpers.higgs import EVENT_ID, FEATURES, generate_events, read_events
from helpers.kafka_settings import check_address, config_option

CODECS = ("none", "gzip", "lz4", "snappy", "zstd")
FIRST_EVENT_ID = 100_000  # as in the challenge's file
CHUNK = 10_000  # events that are generated or encoded at a time, to bound the memory
CONNECT_SECONDS = 10
DELIVERY_SECONDS = 30
LOOP_DELIVERY_SECONDS = 600  # an endless producer waits for its broker
STALLED_SECONDS = 2  # that outcomes may be late
STOP_SECONDS = 10  # what the last events get for their way at Ctrl-C
REPORT_SECONDS = 5  # between two reports of what is wrong
MOST_ON_THE_WAY = 100_000  # events without an outcome, to bound the memory


class ProducerError(RuntimeError):
    """Why nothing, or not everything, could be produced, with what to do about it."""


class Deliveries:
    """Counts what the brokers said of the events sent: acknowledged, or why not.

    Failures, and a broker that gives no answer, are reported on stderr: at once, and then every few
    seconds.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.failed = 0
        self.error: Exception | str = "no answer"  # why the last event failed
        self._settled_at = time.monotonic()  # when there was an outcome, or nothing to wait for
        self._failing_since: float | None = None
        self._lock = threading.Lock()  # outcomes come in the client's thread, and in this one
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def watch(self, future: FutureRecordMetadata) -> None:
        """Count an event once its outcome is known."""
        if not self.on_the_way():
            self._settled_at = time.monotonic()
        self.sent += 1
        future.add_callback(self._succeed)
        future.add_errback(self._fail)

    def refuse(self, error: Exception) -> None:
        """Count an event that the client didn't even take."""
        self.sent += 1
        self._fail(error)

    def on_the_way(self) -> int:
        """Return how many events have no outcome yet."""
        return self.sent - self.acknowledged - self.failed

    def silence(self) -> float:
        """Return for how many seconds there was no outcome, while events were on their way."""
        return time.monotonic() - self._settled_at if self.on_the_way() else 0

    def failing(self) -> float:
        """Return for how many seconds events have failed, and none was acknowledged."""
        since = self._failing_since
        return 0 if since is None else time.monotonic() - since

    def begin_again(self) -> None:
        """Forget the failures of a producer that was replaced, but not their number."""
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
            if not isinstance(error, IllegalStateError):  # what a closed producer says of the rest
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


class Stopping(threading.Event):
    """Set by Ctrl-C and SIGTERM; the second one raises `KeyboardInterrupt`.

    Attributes
    ----------
    exit_code : int
        That of a program that a signal has ended.
    """

    exit_code = 0

    def __init__(self) -> None:
        super().__init__()
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, self._stop)

    def _stop(self, number: int, _: object) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.exit_code = 128 + number
        self.set()


def encode(events: pd.DataFrame) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of each event: its EventId, and a JSON object of the id and 30 features.

    Parameters
    ----------
    events : pandas.DataFrame
        Events with the columns of the challenge; others than EventId and the features are left out.

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
    """Yield the events to send, a chunk at a time; with ``--loop`` round after round.

    Generated rounds go on with new events and new EventIds; a file's rounds repeat its events.
    """
    for round_number in itertools.count():
        if options.csv:
            yield from _file_chunks(options)
        else:
            yield from _generated_chunks(options, round_number)
        if not options.loop:
            return
        stopping.wait(options.pause)


def connect(options: argparse.Namespace) -> KafkaProducer:
    """Return a producer whose events arrive exactly once and on all replicas, or are reported.

    Parameters
    ----------
    options : argparse.Namespace
        With ``bootstrap_servers``, ``compression`` (one of `CODECS`, or None) and
        ``kafka_config``, settings by Kafka's names.

    Raises
    ------
    ProducerError
        If no broker answers within 10 s, or refuses, or the codec isn't installed.
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
        # Large batches are what makes it fast: 37,000 events/s in place of 13,000.
        "batch_size": 2**20,
        "linger_ms": 200,
        "max_block_ms": CONNECT_SECONDS * 1000,
        "request_timeout_ms": DELIVERY_SECONDS * 1000 // 2,
        "delivery_timeout_ms": 1000 * (LOOP_DELIVERY_SECONDS if options.loop else DELIVERY_SECONDS),
        "reconnect_backoff_max_ms": 1000,
        "bootstrap_timeout_ms": CONNECT_SECONDS * 1000,
    }
    try:
        return KafkaProducer(**{**defaults, **python_settings(given, KafkaProducer)})
    except (KafkaTimeoutError, KafkaConnectionError) as error:
        raise ProducerError(
            f"no Kafka broker answers at {servers} within {CONNECT_SECONDS} s: check the "
            "address, or start one with `python -m helpers.broker`."
        ) from error
    except KafkaConfigurationError as error:
        raise ProducerError(f"the settings in --kafka-config don't fit: {error}") from error
    except KafkaError as error:
        raise ProducerError(f"Kafka at {servers} refuses: {error}") from error


class Sender:
    """A producer that is replaced, in a loop, when it gives no answers any more.

    Parameters
    ----------
    options : argparse.Namespace
        As for `connect`, with ``topic`` and ``loop``.
    deliveries : Deliveries
        Counts what becomes of the events.
    stopping : Stopping
        Set when the program is to end.

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
        # Kafka's client calls an event lost after that time, if it works.
        self._patience = self._producer.config["delivery_timeout_ms"] / 1000 + STALLED_SECONDS

    def send(self, key: bytes, value: bytes) -> None:
        """Send an event, as soon as not too many others are on their way.

        Raises
        ------
        ProducerError
            If the topic can't be written to; in a loop only if that is so from the beginning.
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
        """Wait until the outcome of every event is known, or the time is over; then it failed."""
        seconds = STOP_SECONDS if self._stopping.is_set() else self._patience
        deadline = time.monotonic() + seconds
        try:
            # `flush` gives up on batches that the broker finds too large and that are split and
            # sent again, so it only makes sure that everything is on its way.
            with contextlib.suppress(KafkaError):
                self._producer.flush(timeout=seconds)
            while self._deliveries.on_the_way() and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            self._abandon()

    def _is_broken(self) -> bool:
        """Tell whether nothing is acknowledged any more, for whatever reason."""
        is_failing = self._options.loop and self._deliveries.failing() > REPORT_SECONDS
        return is_failing or self._deliveries.silence() > self._patience

    def _replace(self) -> None:
        """Connect a new producer: an idempotent one of kafka-python's stays broken."""
        if not self._options.loop:
            raise ProducerError(f"no answer from Kafka for {self._deliveries.silence():.0f} s")
        self._abandon()
        while not self._stopping.is_set():
            with contextlib.suppress(ProducerError):
                self._producer = connect(self._options)
                self._deliveries.begin_again()
                return

    def _abandon(self) -> None:
        """Close the producer; what it couldn't send has failed then."""
        # Without this, which has no public name, `close` itself would wait for the broker.
        self._producer._sender.force_close()
        self._producer._sender.join(STOP_SECONDS)
        with contextlib.suppress(KafkaError):
            self._producer.close(timeout=1)


def produce(options: argparse.Namespace, sender: Sender, stopping: Stopping) -> None:
    """Send all events, until the program is to stop."""
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
    """Produce as the command line says, and return the exit code."""
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
        print("interrupted once more: what was on the way has failed", file=sys.stderr)
    return _summary(deliveries, options.topic, time.monotonic() - started) or stopping.exit_code


def _summary(deliveries: Deliveries, topic: str, seconds: float) -> int:
    """Print what became of the events; return 1 if some are missing, otherwise 0."""
    print(
        f"{deliveries.acknowledged} events acknowledged by {topic} in {seconds:.1f} s "
        f"({deliveries.acknowledged / seconds:,.0f} events/s)"
    )
    if deliveries.failed:
        print(f"{deliveries.failed} events failed: {deliveries.error}", file=sys.stderr)
    return 1 if deliveries.acknowledged < deliveries.sent else 0


def _generated_chunks(options: argparse.Namespace, round_number: int) -> Iterator[pd.DataFrame]:
    """Yield the generated events of a round; the first n of a seed are the same for every n."""
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
    for first in range(0, len(events), CHUNK):
        yield events.iloc[first : first + CHUNK]


def _pace(rate: float | None, stopping: Stopping) -> Callable[[], None]:
    """Return a function to call before each event, that waits so long that the rate is kept."""
    started = time.monotonic()
    sent = 0

    def wait() -> None:
        nonlocal sent
        sent += 1
        ahead = sent / rate - (time.monotonic() - started)
        if ahead > 0:
            stopping.wait(ahead)

    return wait if rate else lambda: None


def _positive(kind: type) -> Callable[[str], float]:
    """Return a converter for argparse that takes numbers above 0."""

    def number(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bootstrap_servers", nargs="?", default="127.0.0.1:9092", metavar="host:port",
        help="a Kafka broker, or several with commas between; default: %(default)s",
    )
    parser.add_argument("--topic", default="Machine_Learning", help="default: %(default)s")
    parser.add_argument(
        "--events", type=_positive(int), help="how many; default: 100000, or the whole file"
    )
    parser.add_argument("--seed", type=int, default=0, help="of generated events; default: 0")
    parser.add_argument("--csv", help="the challenge's file (.csv or .csv.gz) instead")
    parser.add_argument(
        "--rate", type=_positive(float), help="events per second; default: full speed"
    )
    parser.add_argument("--compression", choices=CODECS, help="default: lz4")
    parser.add_argument(
        "--kafka-config", default={}, metavar="FILE", type=config_option,
        help="settings of Kafka's clients in its properties format, passwords among them",
    )  # fmt: skip
    parser.add_argument("--loop", action="store_true", help="begin again at the end, until Ctrl-C")
    parser.add_argument("--pause", type=float, default=0, help="seconds between rounds; default: 0")
    options = parser.parse_args(arguments)
    if options.events is None and not options.csv:
        options.events = 100_000
    return options


if __name__ == "__main__":
    sys.exit(main())
