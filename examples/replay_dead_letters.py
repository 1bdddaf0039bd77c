"""Send a topic's dead letters back to it, each once, with their keys.

    python examples/replay_dead_letters.py 127.0.0.1:9092 --topic T
    python examples/replay_dead_letters.py 127.0.0.1:9092 --topic T --repair mend.py:mend

A repair function takes a record's bytes (or None) and returns what is to be sent instead; None for
a record that it can't mend, which stays a dead letter for good.

What is sent back, and that it was, becomes visible in one Kafka transaction, so a program that dies
in between has sent nothing; a stream that reads with isolation.level=read_committed never sees a
record twice. The same record may be among the dead letters twice, if its batch was done again:
their headers tell.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import KafkaError

from helpers.broker import check_address
from helpers.security import python_settings
from helpers.sinks import DEAD_LETTERS

Repair = Callable[[bytes | None], bytes | None]
Place = tuple[int, int]  # of a dead letter: its partition and its offset

CONNECT_SECONDS = 10
SILENT_SECONDS = 15  # how long the dead letters may take to be read, from one to the next
LETTERS_PER_TRANSACTION = 1_000


class ReplayError(RuntimeError):
    """Why nothing more is sent back, and what helps."""


def source_of(letter: ConsumerRecord) -> tuple[str, int, int]:
    """Return the topic, the partition and the offset that a dead letter had.

    Raises
    ------
    ReplayError
        If it has no headers that say so.
    """
    headers = dict(letter.headers)
    try:
        topic, partition, offset = (headers[name] for name in ("topic", "partition", "offset"))
        return topic.decode(), int(partition), int(offset)
    except (KeyError, ValueError, AttributeError):
        raise ReplayError(
            f"{letter.topic}, partition {letter.partition}, offset {letter.offset} is no dead "
            "letter: its headers don't name the record's topic, partition and offset."
        ) from None


def read_letters(consumer: KafkaConsumer, topic: str) -> Iterator[ConsumerRecord]:
    """Yield all dead letters that are there now, partition by partition.

    Raises
    ------
    ReplayError
        If they can't be read.
    """
    for number in sorted(consumer.partitions_for_topic(topic) or ()):
        partition = TopicPartition(topic, number)
        consumer.assign([partition])
        consumer.seek_to_beginning()
        (end,) = consumer.end_offsets([partition]).values()
        while (position := consumer.position(partition)) < end:
            letters = consumer.poll(timeout_ms=SILENT_SECONDS * 1000).get(partition, [])
            if not letters and consumer.position(partition) == position:
                raise ReplayError(f"{topic} can't be read: no answer for {SILENT_SECONDS} s.")
            yield from (letter for letter in letters if letter.offset < end)


def new_letters(
    consumer: KafkaConsumer, topic: str
) -> tuple[list[ConsumerRecord], list[ConsumerRecord]]:
    """Return the dead letters that no earlier run has treated, and those of them to be sent back.

    The others are copies: of each other, or of what was sent back earlier.
    """
    letters = list(read_letters(consumer, topic))
    partitions = {TopicPartition(topic, letter.partition) for letter in letters}
    treated = {part.partition: consumer.committed(part) or 0 for part in partitions}
    new = [letter for letter in letters if letter.offset >= treated[letter.partition]]
    seen = {source_of(letter) for letter in letters if letter.offset < treated[letter.partition]}
    originals = []
    for letter in new:
        if source_of(letter) not in seen:
            seen.add(source_of(letter))
            originals.append(letter)
    return new, originals


def send_back(
    producer: KafkaProducer,
    group: str,
    letters: Sequence[ConsumerRecord],
    values: Mapping[Place, bytes | None],
) -> None:
    """Send what dead letters hold to where they came from, and note that, in one transaction.

    Parameters
    ----------
    producer : kafka.KafkaProducer
        Has a transactional id.
    group : str
        The consumer group that notes how far the dead letters are treated.
    letters : sequence of kafka.consumer.fetcher.ConsumerRecord
        Dead letters in the order of their offsets.
    values : mapping
        What to send, by the dead letters' partitions and offsets. Copies, and what can't be mended,
        aren't in it.
    """
    producer.begin_transaction()
    for letter in letters:
        if place_of(letter) in values:
            topic, _, _ = source_of(letter)
            producer.send(topic, values[place_of(letter)], key=letter.key)
    offsets = {
        TopicPartition(letter.topic, letter.partition): OffsetAndMetadata(letter.offset + 1, "", -1)
        for letter in letters
    }
    producer.send_offsets_to_transaction(offsets, group)
    producer.commit_transaction()


def replay(options: argparse.Namespace, settings: dict[str, str]) -> tuple[int, int, int]:
    """Send dead letters back; return how many were sent, couldn't be mended, and were copies."""
    letters_topic = options.topic + DEAD_LETTERS
    group = f"replay-{letters_topic}"
    clients = {**python_settings(settings), "bootstrap_timeout_ms": CONNECT_SECONDS * 1000}
    # Whoever runs this at the same time is cut off here, and what it has begun is undone.
    producer = KafkaProducer(**clients, transactional_id=group, acks="all")
    try:
        producer.init_transactions()
        with KafkaConsumer(**clients, group_id=group, enable_auto_commit=False) as consumer:
            new, originals = new_letters(consumer, letters_topic)
        mended = mend(originals, options.repair)
        for first in range(0, len(new), LETTERS_PER_TRANSACTION):
            send_back(producer, group, new[first : first + LETTERS_PER_TRANSACTION], mended)
    finally:
        producer.close(timeout=5)
    return len(mended), len(originals) - len(mended), len(new) - len(originals)


def mend(letters: Iterable[ConsumerRecord], repair: Repair | None) -> dict[Place, bytes | None]:
    """Return what is to be sent, by the dead letters' partitions and offsets."""
    if repair is None:
        return {place_of(letter): letter.value for letter in letters}
    values = {}
    for letter in letters:
        try:
            values[place_of(letter)] = repair(letter.value)
        except Exception as error:
            raise ReplayError(
                f"the repair of partition {letter.partition}, offset {letter.offset} failed: "
                f"{error!r}. It is to return None for what it can't mend."
            ) from error
    return {place: value for place, value in values.items() if value is not None}


def place_of(letter: ConsumerRecord) -> Place:
    """Return where a dead letter is: its partition and its offset."""
    return letter.partition, letter.offset


def repair_function(text: str) -> Repair:
    """Return the function that ``file.py:name`` names.

    Raises
    ------
    argparse.ArgumentTypeError
        If there is no such file, or no such function in it.
    """
    file, _, name = text.rpartition(":")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text}: give a file and a function, as file.py:function")
    spec = importlib.util.spec_from_file_location("repair", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise argparse.ArgumentTypeError(f"{file} has no function {name!r}")
    return getattr(module, name)


def main(arguments: list[str] | None = None) -> int:
    """Send dead letters back as the command line says, and return the exit code."""
    options = _options(arguments)
    try:
        check_address(options.bootstrap_servers)
        settings = dict(option.split("=", 1) for option in options.kafka_option)
        settings["bootstrap.servers"] = options.bootstrap_servers
        sent, given_up, copies = replay(options, settings)
    except (ReplayError, KafkaError, ValueError, OSError) as error:
        print(f"nothing more is sent back: {error}", file=sys.stderr)
        return 1
    print(
        f"{sent} dead letters sent back to {options.topic}; {given_up} could not be mended, "
        f"{copies} were copies"
    )
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bootstrap_servers", metavar="host:port", help="the Kafka brokers")
    parser.add_argument("--topic", required=True, help="the topic that they came from")
    parser.add_argument(
        "--repair", type=repair_function, metavar="FILE:FUNCTION",
        help="what mends a record's bytes; default: send them as they are",
    )  # fmt: skip
    parser.add_argument(
        "--kafka-option", action="append", default=[], metavar="K=V",
        help="a setting of Kafka's clients, such as security.protocol=SASL_SSL",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
