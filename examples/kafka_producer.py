"""Fill a Kafka topic with Higgs events: one JSON object an event, keyed by its EventId.

    python examples/kafka_producer.py 127.0.0.1:9092 --events 200000
    python examples/kafka_producer.py 127.0.0.1:9092 --csv atlas-higgs-challenge-2014-v2.csv.gz

The events are generated, or read from a CSV file of the ATLAS Higgs challenge. The challenge's
bookkeeping (Label, Weight, ...) stays behind: it is what a network is to find out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kafka.codec
import orjson
import pandas
from kafka import KafkaProducer
from kafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError
from kafka.producer.future import FutureRecordMetadata
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

from helpers.broker import check_address
from helpers.higgs import EVENT_ID, FEATURES, generate_events, read_events

CODECS = ("none", "gzip", "lz4", "snappy", "zstd")
FIRST_EVENT_ID = 100_000  # as in the challenge's file
CHUNK = 10_000  # events that are generated or encoded at a time, to bound the memory
CONNECT_SECONDS = 10
DELIVERY_SECONDS = 30


class ProducerError(RuntimeError):
    """Why nothing, or not everything, could be produced, with what to do about it."""


class Deliveries:
    """Counts what the brokers said of the events sent: acknowledged, or why not."""

    def __init__(self) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.failed = 0
        self.first_error: Exception | None = None

    def watch(self, future: FutureRecordMetadata) -> None:
        """Count an event once its outcome is known."""
        self.sent += 1
        future.add_callback(self._succeed)
        future.add_errback(self._fail)

    def _succeed(self, _: object) -> None:
        self.acknowledged += 1

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        self.first_error = self.first_error or error

    def wait(self, seconds: float) -> None:
        """Return when the outcome of every event is known, or the time is over."""
        deadline = time.monotonic() + seconds
        while self.acknowledged + self.failed < self.sent and time.monotonic() < deadline:
            time.sleep(0.01)


def encode(events: pandas.DataFrame) -> Iterator[tuple[bytes, bytes]]:
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


def chunks(options: argparse.Namespace) -> Iterator[pandas.DataFrame]:
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
        time.sleep(options.pause)


def connect(bootstrap_servers: str, compression: str) -> KafkaProducer:
    """Return a producer whose events arrive exactly once and on all replicas, or are reported.

    Parameters
    ----------
    bootstrap_servers : str
        Addresses of brokers, ``host:port`` separated by commas.
    compression : str
        One of `CODECS`.

    Raises
    ------
    ProducerError
        If no broker answers within 10 s, or the codec isn't installed.
    ValueError
        If the address has no port.
    """
    check_address(bootstrap_servers)
    if compression != "none" and not getattr(kafka.codec, f"has_{compression}")():
        raise ProducerError(
            f"the codec {compression} is not installed: pip install 'kafka-python[{compression}]', "
            "or choose another --compression."
        )
    try:
        return KafkaProducer(
            bootstrap_servers=bootstrap_servers.split(","),
            acks="all",
            enable_idempotence=True,
            compression_type=None if compression == "none" else compression,
            # Large batches are what makes it fast: 37,000 events/s in place of 13,000.
            batch_size=2**20,
            linger_ms=200,
            bootstrap_timeout_ms=CONNECT_SECONDS * 1000,
            max_block_ms=CONNECT_SECONDS * 1000,
            request_timeout_ms=DELIVERY_SECONDS * 1000 // 2,
            delivery_timeout_ms=DELIVERY_SECONDS * 1000,
        )
    except (KafkaTimeoutError, KafkaConnectionError) as error:
        raise ProducerError(
            f"no Kafka broker answers at {bootstrap_servers} within {CONNECT_SECONDS} s: check the "
            "address, or start one with `python -m helpers.broker`."
        ) from error
    except KafkaError as error:
        raise ProducerError(f"Kafka at {bootstrap_servers} refuses: {error}") from error


def produce(producer: KafkaProducer, options: argparse.Namespace) -> Deliveries:
    """Send all events, wait until each is acknowledged or has failed, and return the counts.

    Raises
    ------
    ProducerError
        If the topic can't be written to.
    """
    deliveries = Deliveries()
    pace = _pace(options.rate)
    total = None if options.loop or options.csv else options.events
    with tqdm(total=total, unit=" events", unit_scale=True, disable=None) as bar:
        for events in chunks(options):
            for key, value in encode(events):
                pace()
                deliveries.watch(_send(producer, options.topic, key, value))
            bar.update(len(events))
        # `flush` gives up on batches that the broker finds too large and that are split and sent
        # again, so it only makes sure that everything is on its way.
        with contextlib.suppress(KafkaError):
            producer.flush(timeout=DELIVERY_SECONDS)
        deliveries.wait(DELIVERY_SECONDS)
    return deliveries


def main(arguments: list[str] | None = None) -> int:
    """Produce as the command line says, and return the exit code."""
    options = _options(arguments)
    try:
        producer = connect(options.bootstrap_servers, options.compression)
        try:
            started = time.monotonic()
            deliveries = produce(producer, options)
            seconds = time.monotonic() - started
        finally:
            with contextlib.suppress(KafkaError):
                producer.close(timeout=5)
    except (ProducerError, ValueError, OSError, EOFError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was sent but not acknowledged may be missing", file=sys.stderr)
        return 130
    print(
        f"{deliveries.acknowledged} events acknowledged by {options.topic} in {seconds:.1f} s "
        f"({deliveries.acknowledged / seconds:,.0f} events/s)"
    )
    missing = deliveries.sent - deliveries.acknowledged
    if missing:
        reason = deliveries.first_error or f"no answer within {DELIVERY_SECONDS} s"
        print(f"{missing} events failed: {reason}", file=sys.stderr)
    return 1 if missing else 0


def _generated_chunks(options: argparse.Namespace, round_number: int) -> Iterator[pandas.DataFrame]:
    """Yield the generated events of a round; the first n of a seed are the same for every n."""
    for first in range(0, options.events, CHUNK):
        chunk = generate_events(
            CHUNK,
            seed=(options.seed, round_number, first // CHUNK),
            first_event_id=FIRST_EVENT_ID + round_number * options.events + first,
        )
        yield chunk.head(options.events - first)


def _file_chunks(options: argparse.Namespace) -> Iterator[pandas.DataFrame]:
    events = read_events(options.csv)
    if options.events is not None:
        events = events.head(options.events)
    for first in range(0, len(events), CHUNK):
        yield events.iloc[first : first + CHUNK]


def _pace(rate: float | None) -> Callable[[], None]:
    """Return a function to call before each event, that waits so long that the rate is kept."""
    started = time.monotonic()
    sent = 0

    def wait() -> None:
        nonlocal sent
        sent += 1
        ahead = sent / rate - (time.monotonic() - started)
        if ahead > 0:
            time.sleep(ahead)

    return wait if rate else lambda: None


def _send(producer: KafkaProducer, topic: str, key: bytes, value: bytes) -> FutureRecordMetadata:
    try:
        return producer.send(topic, key=key, value=value)
    except KafkaError as error:
        raise ProducerError(
            f"can't write to topic {topic}: {error}. Check that it exists and may be written to."
        ) from error


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
    parser.add_argument("--compression", choices=CODECS, default="lz4", help="default: %(default)s")
    parser.add_argument("--loop", action="store_true", help="begin again at the end, until Ctrl-C")
    parser.add_argument("--pause", type=float, default=0, help="seconds between rounds; default: 0")
    options = parser.parse_args(arguments)
    if options.events is None and not options.csv:
        options.events = 100_000
    return options


if __name__ == "__main__":
    sys.exit(main())
