"""Tests of examples/streaming_job.py: the pipeline as a program, with either engine."""

import contextlib
import os
import random
import signal
import socket
import sys
import time
import urllib.error

import numpy as np
import psutil
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from processes import (
    ROOT,
    beyond_loopback,
    run_python,
    running,
    scraped,
    wait_until,
    watched,
)

from helpers.broker import LocalKafka, python_settings
from helpers.higgs import FEATURES, generate_events
from helpers.serving import save_serving_model
from helpers.sinks import read_scored
from helpers.spark import spark_home

JOB = ROOT / "examples" / "streaming_job.py"
SECONDS = 600


@pytest.fixture
def filled(topic, produce, event_values):
    """A topic with 1,000 events and two records that are none."""
    keys = [str(number).encode() for number in range(len(event_values))]
    produce(topic, [*event_values, b"rubbish", None], [*keys, b"a", b"b"])
    return topic


@pytest.fixture
def arguments(kafka, topic, tmp_path):
    """Return the job's arguments for an engine."""

    def arguments(engine, *more, output=None):
        return [
            "--engine", engine, "--bootstrap-servers", kafka.bootstrap_servers, "--topic", topic,
            "--output", str(tmp_path / (output or engine)),
            "--checkpoint", str(tmp_path / "checkpoint"), *more,
        ]  # fmt: skip

    return arguments


def score_all(arguments, seconds=SECONDS):
    """Run the job until it has scored what is there."""
    run = run_python(str(JOB), *arguments, "--available-now", seconds=seconds)
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.long
def test_both_engines_store_the_same(spark, kafka, filled, arguments, tmp_path, event_values):
    """The results don't depend on the engine."""
    outputs = []
    for engine in ("dstream", "structured"):
        printed = score_all(arguments(engine)).stdout
        assert printed.startswith("time (UTC)")  # the monitor's lines
        outputs.append(read_scored(spark, str(tmp_path / engine)).toPandas())
    columns = ["EventId", "topic", "partition", "offset"]
    one, other = (output.sort_values("EventId").reset_index(drop=True) for output in outputs)
    assert len(one) == len(event_values) and one["EventId"].is_unique
    assert one[columns].equals(other[columns])
    assert (one["probability_0"] - other["probability_0"]).abs().max() < 1e-6
    assert one["predicted_index"].equals(other["predicted_index"])
    with KafkaConsumer(
        f"{filled}.dead-letter", bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest", consumer_timeout_ms=3_000,
    ) as consumer:  # fmt: skip
        letters = [record.value for record in consumer]
    assert sorted(letters, key=str) == [None, None, b"rubbish", b"rubbish"]  # of each engine


@pytest.mark.long
def test_a_checkpoint_that_is_further_than_the_output_is_refused(filled, arguments):
    """The events between the two aren't left out in silence."""
    score_all(arguments("structured"))
    run = run_python(str(JOB), *arguments("structured", output="another"), seconds=SECONDS)
    assert run.returncode == 1
    assert "is ahead of" in run.stderr.splitlines()[-1], run.stderr


@pytest.mark.parametrize(
    "engine, other, ending",
    [
        ("structured", "dstream", signal.SIGTERM),
        pytest.param("dstream", "structured", signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_service_stops_when_it_is_told_and_lets_nobody_else_write(
    spark, filled, arguments, tmp_path, event_values, engine, other, ending
):
    """A signal ends a job after its batch; its output is locked, its ports are on loopback."""
    with watched([sys.executable, str(JOB), *arguments(engine)]) as (service, seen):
        lines = [service.stdout.readline() for _ in range(2)]
        assert "1,000" in lines[1], lines
        second = run_python(str(JOB), *arguments(other, output=engine), seconds=SECONDS)
        assert second.returncode == 1
        assert "another job writes to" in second.stderr.splitlines()[-1]
        service.send_signal(ending)
        rest, _ = service.communicate(timeout=SECONDS)
        assert service.returncode == 0, rest
    assert read_scored(spark, str(tmp_path / engine)).count() == len(event_values)
    assert len(seen) >= 3 and beyond_loopback(seen) == []


@pytest.mark.long
@pytest.mark.parametrize("engine", ["structured", "dstream"])
def test_a_running_job_is_monitored_from_outside(
    kafka, filled, arguments, produce, event_values, serving_model, tmp_path, engine
):
    """Prometheus sees what the job prints, on loopback only; the group has all offsets."""
    version = save_serving_model(serving_model, tmp_path / "model.keras").version
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/metrics"
    given = ["--metrics-port", str(port), "--model", str(tmp_path / "model.keras")]
    given += ["--kafka-option", f"group.id={filled}"]

    def events(count):
        with contextlib.suppress(urllib.error.URLError):
            found = scraped(url)
            return found if found["scoring_events_total"] == count else None

    with watched([sys.executable, str(JOB), *arguments(engine, *given)]) as (job, seen):
        wait_until(lambda: events(len(event_values)))
        produce(filled, event_values[:10])  # another batch
        found = wait_until(lambda: events(len(event_values) + 10))
        busy = run_python(str(JOB), *arguments(engine, *given, output="another"), seconds=SECONDS)
        job.send_signal(signal.SIGTERM)
        printed, _ = job.communicate(timeout=SECONDS)
        assert job.returncode == 0, printed
    rows = [line.replace(",", "").split() for line in printed.splitlines() if line[2:3] == ":"]
    names = ("events_total", "signal_events_total", "bad_records_total")
    totals = [sum(int(row[column]) for row in rows) for column in (1, 2, 3)]
    assert [found[f"scoring_{name}"] for name in names] == totals
    assert totals[0] == len(event_values) + 10 and totals[2] == 2
    assert found["scoring_batch_seconds_count"] == len(rows) >= 2
    seconds = sum(float(row[4]) for row in rows)
    assert found["scoring_batch_seconds_sum"] == pytest.approx(seconds, abs=0.06 * len(rows))
    assert found["scoring_lag_records"] == int(rows[-1][6]) == 0
    assert found["scoring_model_info", version] == 1
    assert beyond_loopback(seen) == [] and port in {used for _, _, used in seen}
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        committed = admin.list_group_offsets([filled])[filled].values()
    assert sum(found.offset for found in committed) == len(event_values) + 10 + 2
    assert busy.returncode == 1
    assert f"port {port} can't serve the metrics" in busy.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_trained_model_is_served_as_its_file_says(
    spark, kafka, filled, arguments, tmp_path, event_values, serving_model
):
    """The job uses the file's features, scaling, threshold and version."""
    path = tmp_path / "model.keras"
    version = save_serving_model(serving_model, path).version
    score_all(arguments("structured", "--model", str(path)))
    found = read_scored(spark, str(tmp_path / "structured")).orderBy("EventId").toPandas()
    events = generate_events(len(event_values), seed=1)
    expected = serving_model.network.predict(events[list(FEATURES)].to_numpy(), verbose=0)
    np.testing.assert_allclose(found["probability_1"], expected[:, 1], atol=1e-6)
    assert (found["predicted_index"] == (found["probability_1"] >= 0.5)).all()
    assert set(found["model_version"]) == {version}
    serving_model.network.save(path)
    options = arguments("dstream", "--model", str(path), "--available-now")
    run = run_python(str(JOB), *options, seconds=SECONDS)
    assert run.returncode == 1
    assert "has no contract: write it with" in run.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_strict_job_names_the_record_that_stops_it(arguments, filled, spark, tmp_path):
    """The last line has the record's topic, partition, offset and fault."""
    strict = arguments("structured", "--on-bad-record", "stop", "--available-now")
    run = run_python(str(JOB), *strict, seconds=SECONDS)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert f"{filled}, partition " in last and "is not an event: it " in last, run.stderr
    assert read_scored(spark, str(tmp_path / "structured")).count() == 0


REQUIRED = ["--bootstrap-servers", "127.0.0.1:9092", "--topic", "events", "--output", "scored"]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--engine", "structured"], "--engine structured needs a --checkpoint"),
        (["--interval", "0"], "0 is not between 0.001 and 86,400"),
        (["--metrics-port", "70000"], "70000 is not a port between 1 and 65535"),
        (["--kafka-option", "group.id"], "group.id is not of the form K=V"),
        (["--on-bad-record", "ignore"], "invalid choice: 'ignore'"),
        (["--kafka-option", "ssl.key.password=x"], "name the file with --kafka-config"),
        (["--kafka-config", "nowhere"], "nowhere can't be read (No such file or directory)"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(arguments, reason, capsys, example):
    """A typo is a usage error, before Spark starts."""
    with pytest.raises(SystemExit) as end:
        example("streaming_job").main([*REQUIRED, *arguments])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_an_error_of_java_ends_the_job_in_one_line(spark, monkeypatch, capsys, example):
    """An error of Spark that nothing foresees is reported without traceback and secrets."""
    job = example("streaming_job")

    def run(*_):
        spark._jvm.java.lang.Class.forName("no.Such.swordfish")

    monkeypatch.setattr(job, "run", run)
    monkeypatch.setattr(job, "stop_at_signals", lambda stopping: None)
    monkeypatch.setattr(
        job, "kafka_settings", lambda options: {"ssl.key.password": "swordfish"}
    )
    assert job.main([*REQUIRED, "--engine", "dstream"]) == 1
    told = capsys.readouterr().err
    assert told == "streaming_job.py: java.lang.ClassNotFoundException: no.Such.***\n"


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--output", "file://host/c"], "can't have: write file:///host/c."),
        (["--kafka-option", "group.ids=x"], "no setting 'group.ids'"),
        (["--output", "s3a://b/c"], "packages org.apache.hadoop:hadoop-aws:"),
    ],
)
def test_what_spark_and_kafka_refuse_ends_the_job_with_the_reason(
    kafka, topic, arguments, reason, tmp_path
):
    """The last line names the setting, or the package, that is missing."""
    required = ["--bootstrap-servers", kafka.bootstrap_servers, "--topic", topic]
    required += ["--output", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "checkpoint")]
    run = run_python(str(JOB), *required, *arguments)
    assert run.returncode == 1
    assert reason in run.stderr.splitlines()[-1]


@pytest.mark.long
def test_spark_submit_runs_it_with_its_own_settings(
    spark, filled, arguments, tmp_path, event_values
):
    """Options of spark-submit apply to the job."""
    submit = [str(spark_home() / "bin" / "spark-submit"), "--master", "local[1]"]
    submit += ["--conf", "spark.sql.parquet.compression.codec=gzip", str(JOB)]
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_HOME": str(spark_home())}
    command = [*submit, *arguments("structured", "--available-now")]
    with running(command, env=environment) as process:
        printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, printed
    assert read_scored(spark, str(tmp_path / "structured")).count() == len(event_values)
    assert list((tmp_path / "structured" / "data").rglob("*.gz.parquet"))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["dstream", "structured"])
def test_twenty_random_kills_lose_and_repeat_nothing(
    spark, kafka, topic, arguments, engine, tmp_path
):
    """After twenty kills, each event is stored exactly once."""
    producer = [sys.executable, str(ROOT / "examples" / "kafka_producer.py")]
    producer += [kafka.bootstrap_servers, "--topic", topic, "--rate", "2000"]
    producer += ["--events", "5000000"]  # more than come to be sent
    output = str(tmp_path / engine)
    given = {**os.environ, "TMPDIR": str(tmp_path)}
    with running(producer) as source:
        for _ in range(20):
            with running([sys.executable, str(JOB), *arguments(engine)], env=given) as job:
                job.stdout.readline()  # the heading of the monitor's lines
                # Not to wait for something: the moment of the kill is what is tried.
                time.sleep(random.uniform(0, 6))
                kill(job.pid)
        still_producing = source.poll() is None
        source.send_signal(signal.SIGINT)
        source.communicate(timeout=600)
    score_all(arguments(engine), seconds=1_200)
    there = ids_in(kafka, topic)
    found = read_scored(spark, output).select("EventId").toPandas()["EventId"].tolist()
    lost, repeated = set(there) - set(found), len(found) - len(set(found))
    print(f"\n{engine}: 20 kills, {len(there):,} events; lost {len(lost)}, duplicated {repeated}")
    assert still_producing and len(there) == len(set(there))
    assert (len(lost), repeated) == (0, 0)


def kill(process_id):
    """End a driver as a crash does: its Python, its Java and the workers, at once."""
    driver = psutil.Process(process_id)
    for part in (driver, *driver.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker may end by itself
            part.kill()


def ids_in(kafka, topic):
    """Return the ids of all events of a topic: they are the keys."""
    with KafkaConsumer(
        topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest",
        consumer_timeout_ms=5_000,
    ) as consumer:  # fmt: skip
        return [int(record.key) for record in consumer if record.key.isdigit()]


@pytest.mark.long
def test_a_secured_kafka_needs_no_password_on_the_command_line(spark, event_values, tmp_path):
    """The settings are in a file; a right that dead letters lack is said when the job starts."""
    with LocalKafka(security="SASL_SSL") as kafka:
        kafka.create_topic("events", partitions=1)
        with KafkaProducer(**python_settings(kafka.settings, KafkaProducer)) as producer:
            for value in [*event_values[:10], b"rubbish"]:
                producer.send("events", value)
        reader = kafka.add_user("reader")
        kafka.allow("reader", ["READ", "DESCRIBE"], topic="events")
        file = tmp_path / "client.properties"
        file.touch(mode=0o600)
        file.write_text("".join(f"{name}={value}\n" for name, value in reader.items()))
        arguments = ["--engine", "dstream", "--bootstrap-servers", kafka.bootstrap_servers]
        arguments += ["--topic", "events", "--output", str(tmp_path / "scored")]
        arguments += ["--kafka-config", str(file), "--kafka-option", "max.request.size=2000000"]
        run = run_python(str(JOB), *arguments, "--available-now", seconds=SECONDS)
        assert run.returncode == 1
        assert "the ACLs WRITE and DESCRIBE on the topic events.dead-letter are" in run.stderr
        kafka.allow("reader", ["CREATE", "WRITE"], topic="events.dead-letter")
        score_all(arguments)
        with KafkaConsumer(
            "events.dead-letter", **python_settings(kafka.settings, KafkaConsumer),
            auto_offset_reset="earliest", consumer_timeout_ms=5_000,
        ) as consumer:  # fmt: skip
            assert [letter.value for letter in consumer] == [b"rubbish"]
    assert read_scored(spark, str(tmp_path / "scored")).count() == 10
