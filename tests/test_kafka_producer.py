"""The producer program, run as a user runs it, against a real broker."""

import gzip
import os
import re
import signal
import sys
import time

import orjson
import pytest
from processes import ROOT, run_python, running, wait_until
from topics import read_to_end

from helpers.broker import LocalKafka, count_records
from helpers.higgs import EVENT_ID, FEATURES, generate_events

sys.path.insert(0, str(ROOT / "examples"))

import kafka_producer

PRODUCER = str(ROOT / "examples" / "kafka_producer.py")


def read(kafka, topic, count=None):
    """Read a topic's records from the beginning."""
    return read_to_end(kafka, topic)[:count]


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    """A file in CERN's 35-column layout, with generated events."""
    path = tmp_path_factory.mktemp("csv") / "events.csv"
    events = generate_events(50, seed=2)
    events.insert(31, "Weight", 0.5)
    events.assign(KaggleSet="t", KaggleWeight=0.1).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("codec", ["none", "gzip", "lz4", "snappy", "zstd"])
def test_every_codec_arrives(kafka, topic, codec):
    """Events arrive with every codec that --compression offers."""
    run = run_python(
        PRODUCER, kafka.bootstrap_servers, "--topic", topic, "--events", "300",
        "--compression", codec,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"300 events acknowledged by {topic} in ")
    events = [orjson.loads(record.value) for record in read(kafka, topic, 300)]
    assert len({event[EVENT_ID] for event in events}) == 300


def test_records_are_what_the_stream_expects(kafka, topic):
    """A record's key is the event id; its value has the id and the features, but no label."""
    run_python(PRODUCER, kafka.bootstrap_servers, "--topic", topic, "--events", "20")
    for record in read(kafka, topic, 20):
        event = orjson.loads(record.value)
        assert list(event) == [EVENT_ID, *FEATURES]
        assert record.key == str(event[EVENT_ID]).encode()
        assert isinstance(event[EVENT_ID], int)
        assert isinstance(event["PRI_jet_num"], int)
        assert isinstance(event["DER_mass_vis"], float)


def test_the_same_seed_gives_the_same_events_however_many(kafka, topic):
    """A seed's first events are the same, however many are sent."""
    for count in ("5", "9"):
        run_python(PRODUCER, kafka.bootstrap_servers, "--topic", topic, "--events", count)
    by_id = {}
    for record in read(kafka, topic, 14):
        by_id.setdefault(record.key, set()).add(record.value)
    assert len(by_id) == 9
    assert all(len(values) == 1 for values in by_id.values())


@pytest.mark.parametrize("folder", [ROOT, ROOT / "examples"])
def test_a_file_is_sent_without_its_bookkeeping(kafka, topic, csv_file, folder):
    """The label and weights in a file are not sent, whichever folder the program runs in."""
    script = os.path.relpath(PRODUCER, folder)
    run = run_python(
        script, kafka.bootstrap_servers, "--topic", topic, "--csv", str(csv_file), cwd=folder
    )
    assert run.stdout.startswith("50 events acknowledged"), run.stderr
    assert all(
        list(orjson.loads(record.value)) == [EVENT_ID, *FEATURES]
        for record in read(kafka, topic, 50)
    )


def test_a_rate_is_kept(kafka, topic):
    """--rate limits the throughput: 60 events at 30 per second take 2 seconds."""
    run = run_python(
        PRODUCER, kafka.bootstrap_servers, "--topic", topic, "--events", "60", "--rate", "30"
    )
    seconds = float(run.stdout.split(" in ")[1].split(" s ")[0])
    assert seconds >= 1.9


def test_a_pause_is_not_made_up_for():
    """After a second without events, those that follow keep the rate."""
    wait = kafka_producer._pace(50, kafka_producer.Stopping())
    for _ in range(2):
        time.sleep(1)
        began = time.monotonic()
        for _ in range(25):
            wait()
        assert time.monotonic() - began > 0.3  # 0.5 s, but for the 0.1 s that may be made up


def test_a_loop_goes_on_with_new_events_until_ctrl_c(kafka, topic):
    """--loop sends new events, with new ids, until Ctrl-C."""
    command = [sys.executable, PRODUCER, kafka.bootstrap_servers, "--topic", topic]
    command += ["--events", "10", "--loop", "--pause", "0.1"]
    with running(command) as process:
        records = wait_until(lambda: len(found := read(kafka, topic, 40)) == 40 and found)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    assert len({record.key for record in records}) == 40


@pytest.mark.parametrize("options", [[], ["--loop"]])
def test_a_file_without_events_is_refused(kafka, topic, tmp_path, options):
    """The producer ends at once with the reason, also with `--loop`."""
    file = tmp_path / "empty.csv"
    generate_events(1, seed=1).head(0).to_csv(file, index=False)
    run = run_python(
        PRODUCER, kafka.bootstrap_servers, "--topic", topic, "--csv", str(file), *options
    )
    assert run.returncode == 1
    assert "empty.csv has no events: give another file." in run.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--csv", "nowhere.csv"], "no file nowhere.csv: download one from CERN Open Data"),
        (["--compression", "brotli"], "invalid choice: 'brotli'"),
        (["--events", "-5"], "argument --events: -5 is not between 1 and"),
        (["--topic", "t", "--", "nowhere"], "'nowhere' is not the address of a Kafka broker"),
        (["--rate", "0"], "argument --rate: 0 is not between 0.001 and"),
        (["--rate", "nan"], "argument --rate: nan is not between 0.001 and"),
        (["--pause", "inf"], "argument --pause: inf is not between 0 and 86,400"),
        (["--seed", "-1"], "argument --seed: -1 is not between 0 and"),
        (["--topic", "no/topic"], 'Topic name "no/topic" is illegal'),
    ],
)
def test_a_mistake_is_one_line_and_a_failure(kafka, arguments, reason):
    """A wrong option fails with a one-line reason and no traceback."""
    address = [] if "nowhere" in arguments else [kafka.bootstrap_servers]
    run = run_python(PRODUCER, *address, *arguments)
    assert run.returncode != 0
    assert reason in run.stderr
    assert "Traceback" not in run.stderr


def test_a_wrong_column_is_named(kafka, csv_file, tmp_path):
    """An unknown column of the file is named in the error."""
    wrong = tmp_path / "wrong.csv"
    wrong.write_text(csv_file.read_text().replace("DER_mass_vis", "mass"))
    run = run_python(PRODUCER, kafka.bootstrap_servers, "--csv", str(wrong))
    assert run.returncode == 1
    assert "mass" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_download_that_was_cut_off_is_one_line(kafka, tmp_path):
    """A truncated download is reported without a traceback."""
    whole = gzip.compress(generate_events(500, seed=0).to_csv(index=False).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    run = run_python(PRODUCER, kafka.bootstrap_servers, "--csv", str(tmp_path / "cut.csv.gz"))
    assert run.returncode == 1
    assert "end-of-stream" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.long
def test_an_unreachable_broker_is_said_within_the_deadline():
    """An unreachable broker is reported within 15 s."""
    run = run_python(PRODUCER, "127.0.0.1:9", seconds=30)
    assert run.returncode == 1
    assert run.stderr.startswith("no Kafka broker answers at 127.0.0.1:9 within 15 s: check")


def test_an_event_that_fails_makes_the_program_fail(kafka):
    """If events fail, the program reports how many and exits with 1."""
    kafka.create_topic("tiny", partitions=1, config={"max.message.bytes": 500})
    run = run_python(
        PRODUCER, kafka.bootstrap_servers, "--topic", "tiny", "--events", "50",
        "--compression", "none",
    )
    assert run.returncode == 1
    assert run.stdout.startswith("0 events acknowledged")
    assert "50 events failed" in run.stderr


def test_a_codec_that_is_not_installed_is_named(kafka, tmp_path):
    """If a codec's library is missing, the error gives the command that installs it."""
    (tmp_path / "zstandard.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = run_python(
        PRODUCER, kafka.bootstrap_servers, "--compression", "zstd", env=environment
    )
    assert run.returncode == 1
    assert "pip install 'kafka-python[zstd]'" in run.stderr


def size(kafka, topic):
    """Return the current number of records in a topic."""
    return sum(count_records(kafka.bootstrap_servers, topic).values())


@pytest.fixture
def impatient(tmp_path):
    """A settings file with which an event fails after 3 s."""
    file = tmp_path / "producer.properties"
    file.write_text("delivery.timeout.ms = 3000\nrequest.timeout.ms : 1500\nlinger.ms=50\n")
    return ["--kafka-config", str(file)]


def looping(kafka, topic, errors, *more):
    """Run an endless producer, with stderr written to a file."""
    command = [sys.executable, PRODUCER, kafka.bootstrap_servers, "--topic", topic]
    command += ["--loop", "--rate", "500", *more]
    return running(command, stderr=errors.open("w"))


def counted(process, errors):
    """Return the numbers of acknowledged and failed events that the program reports."""
    printed, _ = process.communicate(timeout=600)
    said = errors.read_text()
    missing = re.findall(r"^(\d+) events failed: ", said, re.MULTILINE)
    return int(printed.split()[0]), sum(map(int, missing))


@pytest.mark.parametrize(
    "ending", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM]
)
def test_a_loop_outlasts_a_broker_that_is_away_and_counts_what_failed(tmp_path, impatient, ending):
    """Failures are reported while the loop runs; acknowledged events are in the topic once."""
    errors = tmp_path / "errors"
    with LocalKafka() as kafka:
        kafka.create_topic("events", partitions=2)
        with looping(kafka, "events", errors, *impatient) as process:
            wait_until(lambda: size(kafka, "events") > 10)
            kafka.kill()
            wait_until(lambda: "events failed so far: KafkaTimeoutError" in errors.read_text())
            kafka.start()
            there = size(kafka, "events")
            wait_until(lambda: size(kafka, "events") > there + 100)
            process.send_signal(ending)
            acknowledged, missing = counted(process, errors)
        assert process.returncode == 1
        keys = [int(record.key) for record in read(kafka, "events")]
    assert missing > 0 and len(keys) == len(set(keys))
    assert acknowledged <= len(keys) <= acknowledged + missing
    assert max(keys) - min(keys) < acknowledged + missing  # an id for each event sent


@pytest.mark.long
def test_a_loop_that_waits_for_its_broker_loses_nothing(tmp_path):
    """An outage is reported within seconds, and all events arrive when the broker is back."""
    errors = tmp_path / "errors"
    with LocalKafka() as kafka:
        kafka.create_topic("events", partitions=2)
        with looping(kafka, "events", errors) as process:
            wait_until(lambda: size(kafka, "events") > 10)
            kafka.kill()
            wait_until(lambda: "no answer for" in errors.read_text())
            kafka.start()
            there = size(kafka, "events")
            wait_until(lambda: size(kafka, "events") > there + 100)
            process.send_signal(signal.SIGTERM)
            acknowledged, missing = counted(process, errors)
        keys = [int(record.key) for record in read(kafka, "events")]
    assert process.returncode == 128 + signal.SIGTERM and missing == 0
    assert sorted(keys) == list(range(100_000, 100_000 + acknowledged))


@pytest.mark.long
def test_ctrl_c_while_the_broker_is_away_counts_what_is_known(tmp_path, impatient):
    """Ctrl-C works during an outage, and every event reported as acknowledged is stored."""
    errors = tmp_path / "errors"
    with LocalKafka() as kafka:
        kafka.create_topic("events", partitions=1)
        with looping(kafka, "events", errors, *impatient) as process:
            wait_until(lambda: size(kafka, "events") > 10)
            kafka.kill()
            process.send_signal(signal.SIGINT)
            acknowledged, missing = counted(process, errors)
        assert process.returncode == 1 or missing == 0
        kafka.start()
        assert acknowledged <= len(read(kafka, "events")) <= acknowledged + missing


@pytest.mark.long
def test_a_topic_that_is_closed_meanwhile_is_reported(kafka, topic, tmp_path, impatient):
    """Rejected events are reported as they fail, and the loop continues."""
    errors = tmp_path / "errors"
    with looping(kafka, topic, errors, *impatient) as process:
        wait_until(lambda: size(kafka, topic) > 10)
        configure(kafka, topic, {"max.message.bytes": "100"})
        wait_until(lambda: "events failed so far: " in errors.read_text())
        configure(kafka, topic, {"max.message.bytes": "1000000"})
        there = size(kafka, topic)
        wait_until(lambda: size(kafka, topic) > there + 100)
        process.send_signal(signal.SIGTERM)
        acknowledged, missing = counted(process, errors)
    assert process.returncode == 1 and missing > 0
    assert acknowledged == len(read(kafka, topic))


def configure(kafka, topic, settings):
    """Change a topic's settings."""
    from kafka import KafkaAdminClient
    from kafka.admin import ConfigResource

    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.alter_configs([ConfigResource("TOPIC", topic, settings)])


def test_a_secured_broker_is_written_to_with_settings_from_a_file(tmp_path):
    """Credentials are read from a file, and a missing write permission is reported."""
    with LocalKafka(security="SASL_SSL") as kafka:
        kafka.create_topic("events", partitions=1)
        writer = kafka.add_user("writer")
        kafka.allow("writer", ["WRITE"], topic="events")
        file = tmp_path / "client.properties"
        file.touch(mode=0o600)
        escaped = {name: value.replace("\\", "\\\\") for name, value in writer.items()}
        file.write_text("".join(f"{name}={value}\n" for name, value in escaped.items()))
        given = [kafka.bootstrap_servers, "--events", "20", "--kafka-config", str(file), "--topic"]
        run = run_python(PRODUCER, *given, "events")
        assert run.stdout.startswith("20 events acknowledged by events"), run.stderr
        run = run_python(PRODUCER, *given, "another")
    assert run.returncode == 1
    assert "can't write to topic another: " in run.stderr or "20 events failed: " in run.stderr
    assert "TopicAuthorizationFailedError" in run.stderr


@pytest.mark.parametrize(
    "text, given, expected",
    [
        ("bootstrap.servers=kafka.example.org:9093", [], "kafka.example.org:9093"),
        ("bootstrap.servers=kafka.example.org:9093", ["127.0.0.1:9094"], "127.0.0.1:9094"),
        ("client.id=me", [], "127.0.0.1:9092"),
    ],
)
def test_the_brokers_address_may_come_from_the_file(text, given, expected, tmp_path):
    """The address in a file of settings is used unless the command line has one."""
    file = tmp_path / "client.properties"
    file.write_text(text)
    options = kafka_producer._options([*given, "--kafka-config", str(file)])
    assert options.bootstrap_servers == expected


def test_a_request_may_take_as_long_as_javas_clients_allow(kafka, tmp_path):
    """A file for Kafka's tools may have Java's default, which is the time for a whole delivery."""
    file = tmp_path / "client.properties"
    file.write_text("request.timeout.ms=30000")
    given = [kafka.bootstrap_servers, "--kafka-config", str(file)]
    with kafka_producer.connect(kafka_producer._options(given)) as producer:
        assert producer.config["delivery_timeout_ms"] == 30_200


@pytest.mark.parametrize(
    "text, reason",
    [
        ("no.such=1", "kafka-python has no setting 'no.such': leave it out."),
        ("acks=1", "the settings for Kafka don't fit: "),
        ("linger.ms=soon", "Kafka's setting 'linger.ms' is 'soon': it must be a whole number."),
        (None, "nowhere.properties can't be read (No such file or directory)"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(kafka, tmp_path, text, reason):
    """A wrong setting, or a missing settings file, is reported in one line."""
    file = tmp_path / ("nowhere.properties" if text is None else "client.properties")
    if text is not None:
        file.write_text(text)
    run = run_python(PRODUCER, kafka.bootstrap_servers, "--kafka-config", str(file))
    assert run.returncode != 0
    assert reason in run.stderr.splitlines()[-1]


MANY_SIGNALS = """
import os, random, signal, sys, threading
sys.path.append("examples")
from kafka_producer import Stopping
for _ in range(500):
    stopping = Stopping()
    end = lambda: os.kill(os.getpid(), signal.SIGTERM)
    threading.Timer(random.random() / 100, end).start()
    while not stopping.is_set():
        stopping.wait(1e-6)
print("all ended")
"""


def test_a_signal_ends_the_program_whenever_it_comes():
    """A signal that comes while the program waits for one is no deadlock."""
    assert run_python("-c", MANY_SIGNALS, seconds=300).stdout == "all ended\n"
