"""The broker starts, keeps its data, reports what is wrong, and leaves nothing behind."""

import itertools
import signal
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import ConfigResource
from processes import is_alive, run_python, running, wait_until

from helpers.broker import BrokerError, LocalKafka, free_port, security, server


def write(kafka, topic, count):
    """Write numbered records, each acknowledged."""
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all")
    for number in range(count):
        producer.send(topic, str(number).encode()).get(10)
    producer.close(timeout=5)


def read(kafka, topic, count):
    """Read the first records of a topic."""
    settings = {"auto_offset_reset": "earliest", "consumer_timeout_ms": 30_000}
    with KafkaConsumer(topic, bootstrap_servers=kafka.bootstrap_servers, **settings) as consumer:
        return [int(record.value) for record in itertools.islice(consumer, count)]


def test_data_survives_a_stop_and_a_sigkill():
    """Records outlast a stop and a SIGKILL, and the broker restarts at the same address."""
    with LocalKafka() as kafka:
        address = kafka.bootstrap_servers
        kafka.create_topic("events", partitions=1)
        write(kafka, "events", 10)
        for end in (kafka.kill, kafka.stop):
            end()
            kafka.start()
            assert kafka.bootstrap_servers == address
            assert read(kafka, "events", 10) == list(range(10))


def test_the_broker_starts_in_any_locale(monkeypatch):
    """In Turkish, the capital of i has a dot, and Kafka would not find its names in capitals."""
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    with LocalKafka() as kafka:
        kafka.create_topic("events", partitions=1)
        write(kafka, "events", 1)
        assert read(kafka, "events", 1) == [0]


def test_the_broker_starts_beside_a_spark_with_an_older_scala(monkeypatch, tmp_path):
    """A site's Spark 3.5 has Scala 2.12, and Kafka 4 needs 2.13."""
    (tmp_path / "jars").mkdir()
    (tmp_path / "jars" / "scala-library-2.12.18.jar").touch()
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    with LocalKafka() as kafka:
        kafka.create_topic("events", partitions=1)
        assert "events" in kafka.topics()


@pytest.mark.long
def test_a_failed_restart_keeps_the_data():
    """A restart that fails because the port is taken loses no records."""
    with LocalKafka() as kafka:
        kafka.create_topic("events", partitions=1)
        write(kafka, "events", 5)
        kafka.kill()
        host, port = kafka.bootstrap_servers.split(":")
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((host, int(port)))
            taken.listen()
            with pytest.raises(BrokerError, match="is in use"):
                kafka.start()
        kafka.start()
        assert read(kafka, "events", 5) == list(range(5))


def test_it_listens_on_loopback_only(kafka):
    """Only programs on this machine can reach the broker."""
    port = int(kafka.bootstrap_servers.split(":")[1])
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    addresses = [line.split()[1] for line in listening.splitlines() if " 0A " in line]
    hosts = {host for host, _, number in (a.partition(":") for a in addresses)
             if int(number, 16) == port}
    assert hosts <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert hosts


def test_create_topic_has_partitions_and_settings(kafka):
    """A topic gets the given partitions and settings; creating it again is not an error."""
    kafka.create_topic("with-settings", partitions=3, config={"retention.ms": 60_000})
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        (description,) = admin.describe_topics(["with-settings"])
        configs = str(admin.describe_configs([ConfigResource("TOPIC", "with-settings")]))
    assert len(description["partitions"]) == 3
    assert "60000" in configs
    kafka.create_topic("with-settings", partitions=3)  # exists already
    assert "with-settings" in kafka.topics()


def test_a_port_in_use_is_said_at_once():
    """A start on a port in use fails at once, and the message says to choose another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port} is in use: .* choose another port"):
            LocalKafka(port=port).start()


@pytest.mark.long
def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    """The data is in the folder, whatever its name and the locale, and is found again."""
    name = "é ü [1] 日本 a\\\\b"
    monkeypatch.setenv("LC_ALL", "C")
    for _ in range(2):
        with LocalKafka(folder=tmp_path / name) as kafka:
            kafka.create_topic("kept") if not kafka.topics() else None
            assert kafka.topics() == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "data" / "meta.properties").exists()


@pytest.mark.parametrize("folder", ["", "a,b", "a\nb"])
def test_a_folder_that_kafka_would_misread_is_refused(folder):
    """Kafka takes a comma for the end of a folder's name."""
    with pytest.raises(ValueError, match="choose another folder"):
        LocalKafka(folder=folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """One sentence has the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(BrokerError, match=r"can't be set up in .*: free space"):
        LocalKafka(folder=tmp_path / "file").start()


def test_a_file_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    """A disk that fills up while the broker is set up gives no traceback."""
    (tmp_path / "server.properties").mkdir()
    run = run_python("-m", "helpers.broker", "--port", str(free_port()), "--folder", str(tmp_path))
    assert run.returncode == 1
    assert run.stderr.startswith(f"the broker can't be set up in {tmp_path} ([Errno 21] Is a direc")
    assert run.stderr.endswith("or choose another folder, or another TMPDIR.\n")


def test_a_disk_without_space_for_temporary_files_is_reported(monkeypatch):
    """Python finds no folder for temporary files where it can't write any."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(BrokerError, match=r"no folder for temporary files .* another TMPDIR"):
        LocalKafka()


@pytest.mark.parametrize(
    "module, limit, security, program",
    [(server, "START_SECONDS", None, "java"), (security, "KEYTOOL_SECONDS", "SASL_SSL", "keytool")],
)
def test_a_machine_that_is_too_slow_for_a_start_is_reported(
    module, limit, security, program, monkeypatch
):
    """A program that sets up the broker and doesn't end in time is named, with a remedy."""
    monkeypatch.setattr(module, limit, 0.001)
    with pytest.raises(BrokerError, match=rf"^{program} did not .* within 0.001 s: try again when"):
        LocalKafka(security=security).start()


@pytest.mark.long
def test_a_second_broker_on_a_folder_is_refused_and_the_first_goes_on(tmp_path):
    """Both would write to the same files."""
    with LocalKafka(folder=tmp_path) as kafka:
        with pytest.raises(BrokerError, match="another broker is running with the folder"):
            LocalKafka(folder=tmp_path).start()
        kafka.create_topic("kept")
    with LocalKafka(folder=tmp_path) as kafka:  # the folder is free again
        assert kafka.topics() == ["kept"]


@pytest.mark.long
def test_a_failed_start_shows_the_brokers_last_words(tmp_path):
    """A broker that fails to start reports the reason from its log."""
    with LocalKafka(folder=tmp_path):
        pass
    properties = tmp_path / "data" / "meta.properties"
    properties.write_text(properties.read_text().replace("node.id=1", "node.id=7"))
    with pytest.raises(BrokerError, match=r"(?s)the broker ended.*doesn't match previous node id"):
        LocalKafka(folder=tmp_path).start()


@pytest.mark.long
def test_a_given_folder_stays_and_is_continued(tmp_path):
    """A folder given by the user is kept, and the next broker finds its topics there."""
    with LocalKafka(folder=tmp_path) as kafka:
        kafka.create_topic("kept")
    with LocalKafka(folder=tmp_path) as kafka:
        assert kafka.topics() == ["kept"]


def test_nothing_is_left_when_python_is_killed():
    """If Python is killed, the broker ends and its temporary folder is removed."""
    program = (
        "from helpers.broker import LocalKafka; import os, signal; kafka = LocalKafka().start();"
        "print(kafka._process.pid, kafka.log_file.parent, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = run_python("-c", program)
    process_id, folder = run.stdout.split()
    assert run.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(int(process_id)))
    wait_until(lambda: not Path(folder).exists())


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_runs_until_it_is_told_to_stop(ending):
    """The command serves at the given port until SIGINT or SIGTERM, and exits with 0."""
    port = free_port()
    command = [sys.executable, "-m", "helpers.broker", "--port", str(port)]
    with running(command) as process:
        assert f"ready at 127.0.0.1:{port}" in process.stdout.readline()
        process.send_signal(ending)
        assert process.wait(60) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_stop_that_is_interrupted_leaves_no_broker(monkeypatch):
    """A second Ctrl-C comes while the broker shuts down; nothing else would end it later."""
    kafka = LocalKafka().start()
    broker = psutil.Process(kafka.pid)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kafka._process, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kafka.stop()
    psutil.wait_procs([broker], timeout=60)
    assert not broker.is_running() or broker.status() == psutil.STATUS_ZOMBIE


def test_the_command_refuses_an_impossible_port_in_one_line():
    """An impossible port is reported in one line, without a traceback."""
    run = run_python("-m", "helpers.broker", "--port", "99999")
    assert run.returncode == 1
    assert run.stderr == "port 99999 is out of range: use one between 1024 and 65535.\n"
