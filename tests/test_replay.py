"""Tests of examples/replay_dead_letters.py: what was bad comes back once, mended if need be."""

import sys

import pytest
from kafka import KafkaConsumer
from processes import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from replay_dead_letters import main


@pytest.fixture
def letters(kafka, topic):
    """Put dead letters of a topic into Kafka, by the offsets that they had."""
    from kafka import KafkaProducer

    def put(*offsets, value=b"rubbish"):
        with KafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
            for offset in offsets:
                headers = {"topic": topic, "partition": "0", "offset": str(offset)}
                headers = [(name, text.encode()) for name, text in headers.items()]
                producer.send(
                    f"{topic}.dead-letter", value, key=b"%d" % offset, headers=headers
                ).get(10)

    return put


@pytest.fixture
def replay(kafka, topic, capsys):
    """Run the program, and return what it says."""

    def run(*more):
        code = main([kafka.bootstrap_servers, "--topic", topic, *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def values(kafka, topic):
    """Return what a reader finds in a topic who does not see what was taken back."""
    with KafkaConsumer(
        topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest",
        consumer_timeout_ms=2_000, isolation_level="read_committed",
    ) as consumer:  # fmt: skip
        return sorted((record.key, record.value) for record in consumer)


def test_each_dead_letter_comes_back_once(kafka, topic, letters, replay):
    """Otherwise events would be scored twice after a repair, or never."""
    letters(1, 2, 2)  # a batch that is done again sends its dead letters again
    assert replay() == (0, f"2 dead letters sent back to {topic}; 0 could not be mended, "
                           "1 were copies\n")  # fmt: skip
    letters(2, 3)
    assert replay()[1].startswith("1 dead letters sent back")
    assert replay()[1].startswith("0 dead letters sent back")
    assert values(kafka, topic) == [(b"1", b"rubbish"), (b"2", b"rubbish"), (b"3", b"rubbish")]


def test_a_repair_function_mends_what_it_can(kafka, topic, letters, replay, tmp_path):
    """Otherwise what was bad would be sent back as bad as it was."""
    (tmp_path / "repairs.py").write_text(
        "def mend(value):\n    return b'mended' if value == b'mendable' else None\n"
    )
    letters(1, value=b"mendable")
    letters(2)
    code, said = replay("--repair", f"{tmp_path}/repairs.py:mend")
    assert (code, said.split(";")[1]) == (0, " 1 could not be mended, 0 were copies\n")
    assert values(kafka, topic) == [(b"1", b"mended")]


def test_a_repair_that_fails_sends_nothing(kafka, topic, letters, replay, tmp_path):
    """Otherwise half of them would be sent back, and nobody knew which."""
    (tmp_path / "repairs.py").write_text("def mend(value):\n    return value[100]\n")
    letters(1, 2)
    code, said = replay("--repair", f"{tmp_path}/repairs.py:mend")
    assert code == 1 and "offset 0 failed: IndexError" in said
    assert values(kafka, topic) == []
    assert replay()[1].startswith("2 dead letters sent back")


def test_what_is_no_dead_letter_is_named(topic, produce, replay):
    """Otherwise a topic of another purpose would be sent somewhere."""
    produce(f"{topic}.dead-letter", [b"x"])
    code, said = replay()
    assert code == 1 and "offset 0 is no dead letter: its headers don't name" in said


def test_a_topic_without_dead_letters_has_none_to_send(replay):
    """Otherwise the best case would look like an error."""
    code, said = replay()
    assert (code, said[:1]) == (0, "0")


@pytest.mark.parametrize("repair", ["nofile.py:mend", "{tmp_path}/repairs.py:nothing"])
def test_a_repair_that_is_not_there_is_refused(replay, repair, tmp_path, capsys):
    """Otherwise a typo would send the records back unmended."""
    (tmp_path / "repairs.py").write_text("")
    with pytest.raises(SystemExit):
        replay("--repair", repair.format(tmp_path=tmp_path))
    assert "give a file and a function" in (error := capsys.readouterr().err) or "no func" in error
