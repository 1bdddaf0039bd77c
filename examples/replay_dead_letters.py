"""Send a topic's dead letters back to it, each exactly once, with their keys.

    python examples/replay_dead_letters.py 127.0.0.1:9092 --topic T
    python examples/replay_dead_letters.py 127.0.0.1:9092 --topic T --repair repairs.py:repair

A repair function takes a record's bytes (or None), and returns repaired bytes, or None if it can't
repair the record, which then remains a dead letter for good. The function is called twice per
record: first for all records, so that nothing is sent if it fails for one.

The records and the progress are committed together, in Kafka transactions of up to 1,000 letters:
if the program dies before a commit, nothing in that transaction is sent, and a stream with
isolation.level=read_committed never sees a record twice. If a batch was retried, its dead letters
may have duplicates, which are recognized by their headers and not sent. A letter that can't be sent
back is left where it is, also by later replays, and doesn't stop the others.

A record that is sent back has the time of the replay, because retention would delete one with the
time of the original, if that is old, before anybody reads it. The original's headers are not kept.

The progress is kept in the compacted topic T.dead-letter.replayed, because Kafka expires the
offsets of a consumer group after some days without members.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

from kafka import (
    KafkaAdminClient,
    KafkaConsumer,
    KafkaProducer,
    OffsetAndMetadata,
    TopicPartition,
)
from kafka.admin import ConfigResource
from kafka.codec import zstd_encode
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import KafkaError, TopicAlreadyExistsError

from helpers.broker import CONNECT_TIME_OUT, BrokerError, abandon, connecting, python_settings
from helpers.kafka_settings import check_address, config_option, setting_option
from helpers.records import printable
from helpers.sinks import DEAD_LETTERS

Repair = Callable[[bytes | None], bytes | None]
Place = tuple[int, int]  # of a dead letter: its partition and its offset
Source = tuple[str, str, int, int]  # of a record: topic, topic id, partition and offset

REPLAYED = ".replayed"  # suffix of the name of the topic that keeps the progress
SILENT_SECONDS = 15  # the longest wait for the next dead letters
SILENCE = {"timeout_ms": SILENT_SECONDS * 1000}
COMMIT_SECONDS = 60  # the longest wait for the end of a transaction
DEFAULT_LIMIT = 1_048_588  # Kafka's default max.message.bytes, if the topic's is unknown
RECORD_OVERHEAD = 500  # the most that Kafka adds to a record
LETTERS_PER_TRANSACTION = 1_000
BYTES_PER_TRANSACTION = 16_000_000


class ReplayError(RuntimeError):
    """No more letters are sent back; the message says why and what to do."""


@dataclass
class Letters:
    """The places of dead letters that no earlier run has handled; their bytes stay in Kafka.

    Attributes
    ----------
    new : dict
        The source record of each letter, in the order of offsets.
    originals : set
        The letters to send back. Other letters are copies, or are left where they are.
    left : dict of str to list
        The letters that are left where they are, by reason.
    """

    new: dict[Place, Source | None] = field(default_factory=dict)
    originals: set[Place] = field(default_factory=set)
    left: dict[str, list[Place]] = field(default_factory=dict)

    def leave(self, place: Place, reason: str) -> None:
        """Leave a letter where it is."""
        self.left.setdefault(reason, []).append(place)


def source_of(letter: ConsumerRecord) -> Source | None:
    """Return a dead letter's source record ('' for an unknown topic id); None if it names none."""
    headers = dict(letter.headers)
    try:
        topic, partition, offset = (headers[name] for name in ("topic", "partition", "offset"))
        topic_id = headers.get("topic-id") or b""
        return topic.decode(), topic_id.decode(), int(partition), int(offset)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def read_records(consumer: KafkaConsumer, topic: str) -> Iterator[ConsumerRecord]:
    """Yield a topic's current records, partition by partition.

    Raises
    ------
    ReplayError
        If the records can't be read.
    """
    for number in sorted(consumer.partitions_for_topic(topic) or ()):
        partition = TopicPartition(topic, number)
        consumer.assign([partition])
        consumer.seek_to_beginning()
        (end,) = consumer.end_offsets([partition], **SILENCE).values()
        while (position := consumer.position(partition, **SILENCE)) is None or position < end:
            records = consumer.poll(**SILENCE).get(partition, [])
            if not records and consumer.position(partition, **SILENCE) == position:
                raise ReplayError(f"{topic} can't be read: no answer for {SILENT_SECONDS} s.")
            yield from (record for record in records if record.offset < end)


def new_letters(
    consumer: KafkaConsumer, topic: str, topic_id: str, are_repaired: bool
) -> Letters:
    """Return a topic's dead letters that no earlier run has handled.

    Parameters
    ----------
    consumer : kafka.KafkaConsumer
        A consumer in the group that commits the progress.
    topic : str
        The source topic; letters that name another topic are left.
    topic_id : str
        The Kafka id of the dead-letter topic; '' if the topic doesn't exist. Progress recorded for
        another id refers to other letters.
    are_repaired : bool
        Whether a repair may give a letter without a value one. Otherwise such letters are left: in
        a compacted topic, they would delete newer records with their keys.
    """
    letters, seen, empty = Letters(), set(), set()
    handled = handled_up_to(consumer, topic + DEAD_LETTERS, topic_id)
    for letter in read_records(consumer, topic + DEAD_LETTERS):
        if letter.offset < handled.get(letter.partition, 0):
            seen.add(source_of(letter))
            continue
        letters.new[place_of(letter)] = source_of(letter)
        if letter.value is None and (letter.key is None or not are_repaired):
            empty.add(place_of(letter))
    # Only after reading everything, because a partition that is read later may have a handled copy.
    for place, source in letters.new.items():
        if source is None:
            letters.leave(place, "not a dead letter: no headers that name a record")
        elif source[0] != topic:
            letters.leave(place, f"of another topic, {printable(source[0])!r}")
        elif place in empty:
            letters.leave(place, "without a value")
        elif source not in seen:
            letters.originals.add(place)
        seen.add(source)
    return letters


def read_again(
    consumer: KafkaConsumer, topic: str, places: Container[Place]
) -> Iterator[ConsumerRecord]:
    """Yield a topic's dead letters at the given places."""
    letters = read_records(consumer, topic + DEAD_LETTERS)
    return (letter for letter in letters if place_of(letter) in places)


def parts(letters: Iterable[ConsumerRecord]) -> Iterator[list[ConsumerRecord]]:
    """Yield dead letters in parts that fit in memory and in a transaction."""
    part: list[ConsumerRecord] = []
    total = 0
    for letter in letters:
        size = len(letter.key or b"") + len(letter.value or b"")
        is_full = len(part) == LETTERS_PER_TRANSACTION or total + size > BYTES_PER_TRANSACTION
        if part and is_full:
            yield part
            part, total = [], 0
        part.append(letter)
        total += size
    if part:
        yield part


def handled_up_to(consumer: KafkaConsumer, letters_topic: str, topic_id: str) -> dict[int, int]:
    """Return the next offset to handle after earlier runs, by partition."""
    if not topic_id:
        return {}
    handled = {}
    for number in consumer.partitions_for_topic(letters_topic) or ():
        noted = consumer.committed(
            TopicPartition(letters_topic, number), metadata=True, **SILENCE
        )
        if noted is not None and noted.metadata in ("", topic_id):
            handled[number] = noted.offset
    foreign = {}
    for record in read_records(consumer, letters_topic + REPLAYED):
        foreign.pop(record.key, None)
        if record.value is None:  # it deletes the one before it
            continue
        try:
            number, note = int(record.key), json.loads(record.value)
            if note["topic-id"] == topic_id:
                handled[number] = max(handled.get(number, 0), note["offset"])
        except (ValueError, TypeError, KeyError):
            foreign[record.key] = record.offset
    for offset in foreign.values():
        raise ReplayError(
            f"{letters_topic + REPLAYED} has a record at offset {offset} that this program did not "
            "write: write one with the same key and no value, which deletes it, and let nothing "
            "else write there."
        )
    return handled


def create_notes(admin: KafkaAdminClient, letters_topic: str, replicas: int) -> None:
    """Create the topic that keeps the progress, unless it exists.

    Raises
    ------
    ReplayError
        If the topic can't be created.
    """
    name = letters_topic + REPLAYED
    wanted = {
        "num_partitions": 1, "replication_factor": replicas,
        "configs": {"cleanup.policy": "compact"},
    }  # fmt: skip
    try:
        admin.create_topics({name: wanted}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        return
    except KafkaError as error:
        raise ReplayError(
            f"the topic {name} can't be created: {error}. Create it with 1 partition and "
            "cleanup.policy=compact; the ACLs READ, WRITE and DESCRIBE on it are needed."
        ) from error


def config_of(admin: KafkaAdminClient, topic: str) -> dict[str, dict[str, str]]:
    """Return a topic's settings, each with its `value`; none if this user may not read them."""
    with contextlib.suppress(KafkaError, KeyError):
        found = admin.describe_configs([ConfigResource("TOPIC", topic)], config_filter="all")
        return found["topic"][topic]
    return {}


def check_notes(admin: KafkaAdminClient, notes_topic: str) -> None:
    """Raise `ReplayError` if Kafka would delete the progress after some time.

    The letters would then be sent back again.
    """
    policy = config_of(admin, notes_topic).get("cleanup.policy", {}).get("value", "compact")
    if policy != "compact":
        raise ReplayError(
            f"the topic {notes_topic} has cleanup.policy={policy}, so Kafka will delete which "
            "letters were sent back, and they would be sent again: set it to compact."
        )


def ask(admin: KafkaAdminClient, topic: str) -> tuple[str, int, bool]:
    """Return the id of the dead-letter topic, the topic's size limit, and if it keeps compression.

    The id is '' if there is no dead-letter topic; if there is one, the topic that keeps the
    progress is also created. A topic with a codec of its own compresses records again, and compares
    the result with its limit.
    """
    letters_topic, topic_id = topic + DEAD_LETTERS, ""
    topics = admin.list_topics()
    if topic not in topics:
        raise ReplayError(
            f"there is no topic {topic!r} that this user may see: check its name, and the ACL "
            "DESCRIBE."
        )
    if letters_topic in topics:
        (description,) = admin.describe_topics([letters_topic])
        topic_id = str(description["topic_id"])
        if letters_topic + REPLAYED in topics:
            check_notes(admin, letters_topic + REPLAYED)
        else:
            create_notes(admin, letters_topic, len(description["partitions"][0]["replica_nodes"]))
    config = config_of(admin, topic)
    limit = int(config.get("max.message.bytes", {}).get("value", DEFAULT_LIMIT))
    codec = config.get("compression.type", {}).get("value", "producer")
    return topic_id, limit, codec in ("producer", "zstd")


def leave_large_ones(
    letters: Letters,
    part: Iterable[ConsumerRecord],
    values: dict[Place, bytes | None],
    limit: int,
    compresses: bool,
) -> None:
    """Leave the letters of a part that are too large for a topic, even compressed.

    A single letter that is too large would make the whole transaction fail.
    """
    for letter in part:
        place = place_of(letter)
        content = (letter.key or b"") + (values.get(place) or b"")
        size = len(content) + RECORD_OVERHEAD
        is_large = size > limit
        if is_large and compresses:
            is_large = len(zstd_encode(content)) + RECORD_OVERHEAD > limit
        if place in values and is_large:
            letters.leave(place, f"too large, {size} bytes for {limit}")
            letters.originals.remove(place)
            del values[place]


def send_back(
    producer: KafkaProducer,
    group: str,
    topic: str,
    topic_id: str,
    letters: Sequence[ConsumerRecord],
    values: Mapping[Place, bytes | None],
) -> None:
    """Send dead letters back to their topic, and commit the progress, in one transaction.

    Parameters
    ----------
    producer : kafka.KafkaProducer
        A producer with a transactional id.
    group : str
        The consumer group that commits the progress.
    topic : str
        The topic to send to.
    topic_id : str
        The Kafka id of the dead-letter topic, which is recorded with the progress.
    letters : sequence of kafka.consumer.fetcher.ConsumerRecord
        Dead letters in the order of offsets.
    values : mapping
        The values to send, by the dead letters' partitions and offsets. It has neither copies nor
        letters that can't be repaired.

    Raises
    ------
    kafka.errors.KafkaError
        If a letter isn't sent. The transaction is open then.
    """
    producer.begin_transaction()
    sent = [
        producer.send(topic, values[place_of(letter)], key=letter.key)
        for letter in letters
        if place_of(letter) in values
    ]
    offsets = {
        TopicPartition(letter.topic, letter.partition): OffsetAndMetadata(
            letter.offset + 1, topic_id, -1
        )
        for letter in letters
    }
    for partition, noted in offsets.items():
        note = json.dumps({"offset": noted.offset, "topic-id": topic_id})
        key = str(partition.partition).encode()
        sent.append(producer.send(partition.topic + REPLAYED, note.encode(), key=key))
    answered(producer.flush)
    for future in sent:  # kafka-python commits a transaction without the records that it gave up
        future.get(timeout=0)
    answered(producer.send_offsets_to_transaction, offsets, group)
    answered(producer.commit_transaction)


def answered(call: Callable[..., None], *arguments: object) -> None:
    """Call a method of a producer that would wait for ever for a broker that is away.

    Raises
    ------
    ReplayError
        If Kafka gives no answer within 60 s. Whether the transaction is committed is then unknown
        here; the next run finds out.
    """
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        outcome.result(COMMIT_SECONDS)
    except FutureTimeoutError:
        raise ReplayError(
            f"Kafka gave no answer for {COMMIT_SECONDS} s. Run it once more when the broker is "
            "back: letters that were sent back are not sent again."
        ) from None


def replay(options: argparse.Namespace, settings: dict[str, str]) -> tuple[int, int, int, Letters]:
    """Send dead letters back; return the numbers of sent, unrepaired and copied ones, and all."""
    topic = options.topic
    group = f"replay-{topic}{DEAD_LETTERS}"
    asking = {**python_settings(settings), **CONNECT_TIME_OUT}
    with connecting(settings["bootstrap.servers"]), KafkaAdminClient(**asking) as admin:
        topic_id, limit, compresses = ask(admin, topic)
    # `init_transactions` fences off a concurrent run and aborts its open transaction.
    producer = KafkaProducer(
        **{
            **python_settings(settings, KafkaProducer), **CONNECT_TIME_OUT,
            "transactional_id": group,
            # The topic limits the compressed size; see `leave_large_ones`.
            "acks": "all", "compression_type": "zstd", "max_request_size": 2**30,
        }
    )  # fmt: skip
    try:
        producer.init_transactions()
        reader = python_settings(settings, KafkaConsumer)
        given = {
            **reader, **CONNECT_TIME_OUT, "group_id": group, "enable_auto_commit": False,
            "isolation_level": "read_committed",
        }  # fmt: skip
        with KafkaConsumer(**given) as consumer:
            letters = new_letters(consumer, topic, topic_id, options.repair is not None)
            if options.repair:
                for letter in read_again(consumer, topic, letters.originals):
                    repaired([letter], options.repair)
            sent = 0
            for part in parts(read_again(consumer, topic, letters.new)):
                chosen = [letter for letter in part if place_of(letter) in letters.originals]
                values = repaired(chosen, options.repair)
                leave_large_ones(letters, chosen, values, limit, compresses)
                send_back(producer, group, topic, topic_id, part, values)
                sent += len(values)
    except BaseException:
        abandon(producer)
        raise
    producer.close(timeout=5)
    unrepaired = len(letters.originals) - sent
    copies = len(letters.new) - len(letters.originals) - sum(map(len, letters.left.values()))
    return sent, unrepaired, copies, letters


def repaired(
    letters: Iterable[ConsumerRecord], repair: Repair | None
) -> dict[Place, bytes | None]:
    """Return the values to send, by the dead letters' partitions and offsets."""
    if repair is None:
        return {place_of(letter): letter.value for letter in letters}
    values = {}
    for letter in letters:
        try:
            values[place_of(letter)] = repair(letter.value)
        except Exception as error:
            raise ReplayError(
                f"the repair of partition {letter.partition}, offset {letter.offset} failed: "
                f"{error!r}. It must return None for a record that it can't repair."
            ) from error
        if not isinstance(values[place_of(letter)], bytes | None):
            raise ReplayError(
                f"the repair of partition {letter.partition}, offset {letter.offset} returned "
                f"{type(values[place_of(letter)]).__name__}: it must return bytes or None."
            )
    return {place: value for place, value in values.items() if value is not None}


def place_of(letter: ConsumerRecord) -> Place:
    """Return a dead letter's partition and offset."""
    return letter.partition, letter.offset


def repair_function(text: str) -> Repair:
    """Return the function given as ``file.py:name``.

    Raises
    ------
    argparse.ArgumentTypeError
        If the file doesn't exist, can't be loaded, or has no such function.
    """
    file, _, name = text.rpartition(":")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text}: give a file and a function, as file.py:function")
    spec = importlib.util.spec_from_file_location("repair", file)
    if spec is None:
        raise argparse.ArgumentTypeError(f"{file} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise argparse.ArgumentTypeError(f"{file} can't be loaded: {error!r}") from None
    if not callable(getattr(module, name, None)):
        raise argparse.ArgumentTypeError(f"{file} has no function {name!r}")
    return getattr(module, name)


def main(arguments: list[str] | None = None) -> int:
    """Send dead letters back according to the command line, and return the exit code."""
    options = _options(arguments)
    try:
        check_address(options.bootstrap_servers)
        settings = {**options.kafka_config, **dict(options.kafka_option)}
        settings["bootstrap.servers"] = options.bootstrap_servers
        sent, unrepaired, copies, letters = replay(options, settings)
    except (ReplayError, BrokerError, KafkaError, ValueError, OSError) as error:
        print(f"no more letters are sent back: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "interrupted: letters that were sent back are not sent again; run it once more",
            file=sys.stderr,
        )
        return 130
    print(
        f"{sent} dead letters sent back to {options.topic}; {unrepaired} could not be repaired, "
        f"{copies} were copies"
    )
    for reason, left in letters.left.items():
        print(
            f"{len(left)} left in {options.topic}{DEAD_LETTERS}, also by later replays, {reason}; "
            f"the first is at partition {left[0][0]}, offset {left[0][1]}",
            file=sys.stderr,
        )
    return 1 if letters.left else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bootstrap_servers", metavar="host:port", help="the Kafka brokers")
    parser.add_argument("--topic", required=True, help="the topic that the letters came from")
    parser.add_argument(
        "--repair", type=repair_function, metavar="FILE:FUNCTION",
        help="a function that repairs a record's bytes; default: send records unchanged",
    )  # fmt: skip
    parser.add_argument(
        "--kafka-config", default={}, metavar="FILE", type=config_option,
        help="settings for Kafka clients, including passwords, in Kafka's properties format",
    )  # fmt: skip
    parser.add_argument(
        "--kafka-option", action="append", default=[], metavar="K=V", type=setting_option,
        help="another setting, such as client.id=replay; may be repeated",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
