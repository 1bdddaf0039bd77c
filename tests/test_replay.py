"""The replay program: each dead letter is sent back once, repaired if necessary."""

import os
import sys

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource
from kafka.errors import MessageSizeTooLargeError
from processes import ROOT, wait_until
from topics import read_to_end

from helpers.broker import LocalKafka

sys.path.insert(0, str(ROOT / "examples"))

import replay_dead_letters
from replay_dead_letters import main, place_of, send_back


@pytest.fixture
def letters(kafka, topic):
    """Write dead letters of a topic, given their original offsets."""

    def put(*offsets, value=b"rubbish", to=None, **more):
        with KafkaProducer(
            bootstrap_servers=kafka.bootstrap_servers, max_request_size=2**24,
            compression_type="zstd",
        ) as producer:  # fmt: skip
            for offset in offsets:
                headers = {"topic": topic, "partition": "0", "offset": str(offset)}
                headers |= {name.replace("_", "-"): text for name, text in more.items()}
                headers = [(name, text.encode()) for name, text in headers.items()]
                producer.send(
                    f"{topic}.dead-letter", value, key=b"%d" % offset, headers=headers,
                    partition=to,
                ).get(10)  # fmt: skip

    return put


@pytest.fixture
def replay(kafka, topic, capsys):
    """Run the program, and return its exit status and output."""

    def run(*more):
        code = main([kafka.bootstrap_servers, "--topic", topic, *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def values(kafka, topic):
    """Return the committed records of a topic, sorted."""
    return sorted((record.key, record.value) for record in read_to_end(kafka, topic))


def test_each_dead_letter_comes_back_once(kafka, topic, letters, replay):
    """Each dead letter is sent back once, even if it is stored twice or replayed again."""
    letters(1, 2, 2)  # a retried batch writes its dead letters again
    assert replay() == (0, f"2 dead letters sent back to {topic}; 0 could not be repaired, "
                           "1 were copies\n")  # fmt: skip
    letters(2, 3)
    assert replay()[1].startswith("1 dead letters sent back")
    assert replay()[1].startswith("0 dead letters sent back")
    assert values(kafka, topic) == [(b"1", b"rubbish"), (b"2", b"rubbish"), (b"3", b"rubbish")]


def test_a_copy_in_another_partition_is_not_sent_back(kafka, topic, letters, replay):
    """Copies are recognized even if a missing key or new partitions put them elsewhere."""
    kafka.create_topic(f"{topic}.dead-letter", partitions=2)
    letters(1, to=1)
    assert replay()[1].startswith("1 dead letters sent back")
    letters(1, to=0)
    letters(2, to=0)
    letters(2, to=1)
    assert replay()[1].endswith(f"1 dead letters sent back to {topic}; 0 could not be repaired, "
                                "2 were copies\n")  # fmt: skip
    assert values(kafka, topic) == [(b"1", b"rubbish"), (b"2", b"rubbish")]


def test_what_was_sent_back_is_known_after_its_group_is_forgotten(
    kafka, topic, letters, replay, produce
):
    """Replayed letters are known even after Kafka has removed the idle consumer group."""
    letters(1, 2)
    assert replay()[1].startswith("2 dead letters sent back")
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_groups([f"replay-{topic}.dead-letter"])
    letters(3)
    assert replay()[1].startswith("1 dead letters sent back")
    assert replay()[1].startswith("0 dead letters sent back")
    assert [key for key, _ in values(kafka, topic)] == [b"1", b"2", b"3"]
    notes = f"{topic}.dead-letter.replayed"
    produce(notes, [b"a remark"], [b"by hand"])
    assert "that this program did not write: write one with the same key" in replay()[1]
    produce(notes, [None], [b"by hand"])
    assert replay()[1].startswith("0 dead letters sent back")
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        found = admin.describe_configs([ConfigResource("TOPIC", notes)], config_filter="all")
    assert found["topic"][notes]["cleanup.policy"]["value"] == "compact"


def test_many_bytes_are_sent_back_in_several_transactions(kafka, topic, letters, replay):
    """Transactions are bounded in bytes: 18 MB take two."""
    letters(*range(20), value=os.urandom(900_000), to=0)
    assert replay()[1].startswith("20 dead letters sent back")
    assert len(values(kafka, f"{topic}.dead-letter.replayed")) == 2
    assert [key for key, _ in values(kafka, topic)] == sorted(b"%d" % n for n in range(20))


def test_a_repair_function_repairs_what_it_can(kafka, topic, letters, replay, tmp_path):
    """The repair function's result is sent, and letters that it can't repair are counted."""
    (tmp_path / "beside_it.py").write_text("FIXED = b'repaired'\n")
    (tmp_path / "repairs.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from beside_it import FIXED\n"
        "@dataclass\nclass Record:\n    value: bytes\n"
        "def repair(value):\n"
        "    return FIXED if Record(value) == Record(b'repairable') else None\n"
    )
    letters(1, value=b"repairable")
    letters(2)
    code, said = replay("--repair", f"{tmp_path}/repairs.py:repair")
    assert (code, said.split(";")[1]) == (0, " 1 could not be repaired, 0 were copies\n")
    assert values(kafka, topic) == [(b"1", b"repaired")]


def test_a_tombstone_is_sent_back_only_with_a_value(kafka, topic, letters, replay):
    """In a compacted topic, it would delete newer records with its key."""
    letters(0, value=None)
    letters(1)
    code, said = replay()
    assert code == 1 and f"1 dead letters sent back to {topic}" in said
    left = f"1 left in {topic}.dead-letter, also by later replays, without a value"
    assert f"{left}; the first is at" in said
    assert values(kafka, topic) == [(b"1", b"rubbish")]


def test_a_repair_that_fails_sends_nothing(kafka, topic, letters, replay, tmp_path):
    """If the repair function raises, nothing is sent, and a later run can send everything."""
    (tmp_path / "repairs.py").write_text("def repair(value):\n    return value[100]\n")
    letters(1, 2)
    code, said = replay("--repair", f"{tmp_path}/repairs.py:repair")
    assert code == 1 and "offset 0 failed: IndexError" in said
    assert values(kafka, topic) == []
    assert replay()[1].startswith("2 dead letters sent back")


def test_a_letter_that_cannot_be_sent_back_is_named_and_stops_no_other(
    kafka, topic, letters, produce, replay
):
    """Invalid letters and those of other topics are reported, and the others are sent."""
    produce(f"{topic}.dead-letter", [b"x"])
    kafka.create_topic("another-topic")
    letters(1, topic="another-topic")
    letters(1, topic="another\x1b[2J")
    letters(2, partition="first")
    letters(3)
    code, said = replay()
    assert code == 1 and said.startswith("1 dead letters sent back")
    left = f"2 left in {topic}.dead-letter, also by later replays, not a dead letter"
    assert f"{left}: no headers that" in said
    assert "1 left in" in said and "of another topic, 'another-topic'; the first is at part" in said
    assert "\x1b" not in said
    assert values(kafka, topic) == [(b"3", b"rubbish")] and values(kafka, "another-topic") == []
    assert replay()[:1] == (0,)


def test_a_letter_that_the_topic_refuses_stops_no_other(kafka, topic, letters, replay):
    """A letter too large for the topic is reported and left; one that compresses well is sent."""
    letters(1, 2)
    letters(3, value=os.urandom(900_000))
    letters(4, value=b"rubbish" * 500_000)
    letters(5)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.alter_configs([ConfigResource("TOPIC", topic, {"max.message.bytes": "100000"})])
    code, said = replay()
    assert code == 1 and said.startswith("4 dead letters sent back")
    assert "1 left in" in said and "too large, 900501 bytes for 100000; the first is" in said
    assert [key for key, _ in values(kafka, topic)] == [b"1", b"2", b"4", b"5"]
    assert replay()[1].startswith("0 dead letters sent back")


def test_a_topic_that_compresses_by_itself_decides_what_fits(kafka, topic, letters, replay):
    """A letter that fits only as the program compresses it stops no other."""
    letters(1)
    letters(2, value=b"rubbish" * 500_000)
    letters(3)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        changed = {"max.message.bytes": "100000", "compression.type": "uncompressed"}
        admin.alter_configs([ConfigResource("TOPIC", topic, changed)])
    code, said = replay()
    assert code == 1 and "too large, 3500501 bytes for 100000" in said
    assert [key for key, _ in values(kafka, topic)] == [b"1", b"3"]


def test_letters_that_kafka_does_not_take_do_not_count_as_sent(kafka, topic, letters):
    """A record that isn't sent fails the transaction; kafka-python would commit the others."""
    letters(1)
    place = {"bootstrap_servers": kafka.bootstrap_servers}
    (letter,) = read_to_end(kafka, f"{topic}.dead-letter")
    with KafkaProducer(**place, transactional_id=topic, max_request_size=1_000) as producer:
        producer.init_transactions()
        with pytest.raises(MessageSizeTooLargeError):
            send_back(producer, topic, topic, "", [letter], {place_of(letter): bytes(2_000)})
        producer.abort_transaction()
    assert values(kafka, topic) == []


def test_progress_that_kafka_would_delete_is_refused(kafka, topic, letters, replay):
    """The topic of the progress must be compacted, or letters would be sent back again."""
    letters(1)
    kafka.create_topic(f"{topic}.dead-letter.replayed", partitions=1)
    code, said = replay()
    assert code == 1 and "has cleanup.policy=delete, so Kafka will delete which letters" in said
    assert values(kafka, topic) == []


def test_letters_of_a_topic_that_cannot_be_seen_stay(kafka, topic, letters, replay):
    """A topic that was deleted, or that the user may not see, is named; nothing counts as sent."""
    letters(1)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_topics([topic])
        wait_until(lambda: topic not in admin.list_topics())
        code, said = replay()
        assert code == 1 and f"there is no topic {topic!r}" in said
        kafka.create_topic(topic, partitions=1)
    assert replay()[1].startswith("1 dead letters sent back")


def test_a_record_has_the_time_of_the_replay(kafka, topic, letters, replay):
    """An event of long ago is sent back as a new record, which retention keeps."""
    letters(1, timestamp="1700000000000")
    assert replay()[0] == 0
    (record,) = read_to_end(kafka, topic)
    assert record.timestamp > 1_700_000_000_000


KILL = """
import os
calls = []
def repair(value):
    calls.append(value)
    if len(calls) == 2:
        os.kill({pid}, 9)
    return value
"""


@pytest.mark.long
def test_a_broker_that_goes_away_is_an_error_in_time(tmp_path, capsys, monkeypatch):
    """A broker that dies in the middle ends the program with a reason; it doesn't wait for ever."""
    monkeypatch.setattr(replay_dead_letters, "COMMIT_SECONDS", 3)
    with LocalKafka() as broker:
        broker.create_topic("events")
        with KafkaProducer(bootstrap_servers=broker.bootstrap_servers) as producer:
            headers = [("topic", b"events"), ("partition", b"0"), ("offset", b"1")]
            producer.send("events.dead-letter", b"rubbish", headers=headers).get(10)
        (tmp_path / "repairs.py").write_text(KILL.format(pid=broker.pid))
        arguments = ["--topic", "events", "--repair", f"{tmp_path}/repairs.py:repair"]
        assert main([broker.bootstrap_servers, *arguments]) == 1
    assert "no more letters are sent back" in capsys.readouterr().err


def test_a_topic_of_the_same_name_has_other_records(kafka, topic, letters, replay):
    """The same offset of a recreated topic is another record, not a copy."""
    letters(1, topic_id="first")
    letters(1, 1, topic_id="second")
    assert replay()[1].startswith("2 dead letters sent back")
    assert len(values(kafka, topic)) == 2


def test_dead_letters_that_were_deleted_and_come_again_are_sent_back(kafka, topic, letters, replay):
    """What is known of a deleted dead-letter topic doesn't apply to its successor."""
    letters(1, 2, 3)
    assert replay()[1].startswith("3 dead letters sent back")
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_topics([f"{topic}.dead-letter"])
    wait_until(lambda: f"{topic}.dead-letter" not in kafka.topics())
    kafka.create_topic(f"{topic}.dead-letter", partitions=4)
    letters(4, 5, 6)
    assert replay()[1].startswith("3 dead letters sent back")
    assert replay()[1].startswith("0 dead letters sent back")


def test_a_repair_that_returns_text_is_said(kafka, topic, letters, replay, tmp_path):
    """A repair function that returns str instead of bytes is reported."""
    (tmp_path / "repairs.py").write_text("def repair(value):\n    return value.decode()\n")
    letters(1)
    code, said = replay("--repair", f"{tmp_path}/repairs.py:repair")
    assert code == 1 and "offset 0 returned str: it must return bytes or None." in said


def test_a_secured_broker_is_used_with_settings_from_a_file(tmp_path, capsys):
    """Credentials for a secured broker are read from a file."""
    with LocalKafka(security="SASL_SSL") as secure:
        for name in ("events", "events.dead-letter"):
            secure.create_topic(name, partitions=1)
        file = tmp_path / "client.properties"
        file.touch(mode=0o600)
        file.write_text("".join(f"{n}={v}\n" for n, v in secure.settings.items()))
        arguments = [secure.bootstrap_servers, "--topic", "events", "--kafka-config", str(file)]
        assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("0 dead letters sent back")


def test_a_topic_without_dead_letters_has_none_to_send(replay):
    """A topic without dead letters is not an error."""
    code, said = replay()
    assert (code, said[:1]) == (0, "0")


def test_a_repair_that_cannot_be_loaded_is_refused(replay, tmp_path, capsys):
    """An error in the file of the repair function is a usage error."""
    (tmp_path / "repairs.py").write_text("def repair(value)\n")
    with pytest.raises(SystemExit):
        replay("--repair", f"{tmp_path}/repairs.py:repair")
    assert "repairs.py can't be loaded: SyntaxError" in capsys.readouterr().err


def test_a_topic_that_does_not_exist_is_not_a_success(replay, topic):
    """A mistake in the name would look as if there were no dead letters."""
    code, said = replay("--topic", f"no-{topic}")
    assert code == 1 and "check its name" in said


def test_a_repair_in_a_file_of_another_kind_is_refused(replay, tmp_path, capsys):
    """Python loads only files whose names end in .py."""
    (tmp_path / "repairs.txt").write_text("def repair(value): return value")
    with pytest.raises(SystemExit):
        replay("--repair", f"{tmp_path}/repairs.txt:repair")
    assert "its name must end in .py" in capsys.readouterr().err


@pytest.mark.parametrize("repair", ["nofile.py:repair", "{tmp_path}/repairs.py:nothing"])
def test_a_repair_that_is_not_there_is_refused(replay, repair, tmp_path, capsys):
    """A repair function that doesn't exist is a usage error."""
    (tmp_path / "repairs.py").write_text("")
    with pytest.raises(SystemExit):
        replay("--repair", repair.format(tmp_path=tmp_path))
    assert "give a file and a function" in (error := capsys.readouterr().err) or "no func" in error
