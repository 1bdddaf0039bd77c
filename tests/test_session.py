"""The Spark session: the existing one or a new one, ready for Kafka and for `helpers`."""

import os
import re
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyspark
import pytest
from kafka import KafkaAdminClient
from processes import arrange_spark, run_python, wait_until
from pyspark import RDD, SparkConf

from helpers.kafka_settings import SECRET_SETTINGS
from helpers.spark import (
    SessionError,
    changed_settings,
    get_spark,
    java_exit,
    protect_folder,
    scratch,
    separate_session,
    session,
)


def test_the_existing_session_is_used(spark):
    """An existing session is reused."""
    assert get_spark(app_name="another").sparkContext is spark.sparkContext


def test_a_task_has_four_tries_on_the_laptop_too(spark):
    """A local task is tried up to four times, so a killed worker doesn't fail the job."""
    assert spark.sparkContext.master == "local[2,4]"


def test_workers_run_this_python_and_import_helpers(spark):
    """Workers run the driver's Python and can import `helpers`."""

    def look(_):
        import helpers.higgs

        yield sys.executable, len(helpers.higgs.FEATURES)

    assert set(spark.sparkContext.parallelize(range(2), 2).mapPartitions(look).collect()) == {
        (sys.executable, 30)
    }


def test_settings_of_a_new_session():
    """A session on YARN gets the given resources and settings."""
    settings = session._settings("name", "yarn", 5, 3, "4g", {"spark.locality.wait": 0})
    assert settings["spark.master"] == "yarn"
    assert settings["spark.executor.instances"] == "5"
    assert "spark.dynamicAllocation.enabled" not in settings  # left to the cluster
    assert settings["spark.executor.cores"] == "3"
    assert settings["spark.executor.memory"] == "4g"
    assert settings["spark.locality.wait"] == "0"
    assert settings["spark.serializer"].endswith("KryoSerializer")
    assert "spark.driver.host" not in settings  # remote executors must reach the driver


def test_a_sites_jars_and_java_options_stay(tmp_path):
    """Beside the kit's, a session has the jars and Java options of a site's spark-defaults.conf."""
    jar = tmp_path / "site.jar"
    zipfile.ZipFile(jar, "w").close()
    (tmp_path / "spark-defaults.conf").write_text(
        f"spark.jars  {jar}\nspark.driver.extraJavaOptions -Dsite.name=\"CERN B\" -Dsite.hall=2\n"
    )
    program = """
from helpers.spark import get_spark
spark = get_spark()
system = spark._jvm.java.lang.System
print(system.getProperty("site.name"), system.getProperty("site.hall"))
print(spark.sparkContext.getConf().get("spark.jars"))
"""
    run = run_python("-c", program, env={**os.environ, "SPARK_CONF_DIR": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    site, jars = run.stdout.splitlines()[-2:]
    assert site == "CERN B 2"
    assert "site.jar" in jars and "spark-sql-kafka" in jars


@pytest.mark.parametrize(
    "jar, is_kept",
    [
        ("/opt/site/spark-avro_2.13-4.2.0.jar", True),
        ("hdfs:///site/kafka-schema-registry-client-7.9.jar", True),
        ("/opt/site/kafka-clients-2.8.0.jar", False),
        ("/opt/site/org.apache.kafka_kafka-clients-2.8.0.jar", False),
        ("/opt/site/spark-sql-kafka-0-10_2.13-4.0.0.jar", False),
    ],
)
def test_a_sites_other_version_of_the_connector_is_left_out(jar, is_kept, monkeypatch, tmp_path):
    """Java takes a class from the first jar that has it, and the connector needs its own client."""
    (tmp_path / "spark-defaults.conf").write_text(f"spark.jars /opt/site/a.jar, {jar}\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    ours = session._connector_jars(*session.spark_and_scala())
    assert session._site_jars(ours) == ["/opt/site/a.jar", *([jar] if is_kept else [])]


@pytest.mark.parametrize(
    "name",
    [
        "spark.hadoop.fs.azure.account.key.store.dfs.core.windows.net",
        "spark.hadoop.fs.azure.sas.container.store", "spark.hadoop.fs.s3a.encryption.key",
        "spark.hadoop.fs.s3a.secret.key", "spark.authenticate",
    ],
)  # fmt: skip
def test_what_java_does_not_get_on_its_command_line(name):
    """Secrets aren't shown to other users, and a laptop's doors aren't those of a later cluster."""
    conf = SparkConf(loadDefaults=False).setAll([(name, "value"), ("spark.app.name", "shown")])
    assert session._without_secrets(conf).getAll() == [("spark.app.name", "shown")]


def test_a_spark_without_connector_is_said_at_once(monkeypatch, tmp_path):
    """A Spark version without a Kafka connector is reported before the first read."""
    monkeypatch.setattr(session, "fetch_jars", lambda coordinate: _no_such(coordinate))
    with pytest.raises(SessionError, match=r"Spark 9\.9\.9 needs a connector to read Kafka\."):
        session._connector_jars("9.9.9", "2.13")


@pytest.mark.parametrize(
    "name, value",
    [
        ("SPARK_REMOTE", "sc://host"), ("SPARK_CONNECT_MODE_ENABLED", "1"),
        ("SPARK_API_MODE", "connect"), ("SPARK_CONNECT_MODE", "1"),
    ],
)  # fmt: skip
def test_spark_connect_is_refused(monkeypatch, name, value):
    """Spark Connect can't reach Kafka's clients, and the message says what to do instead."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SessionError, match=r"this is Spark Connect.*unset SPARK_REMOTE"):
        get_spark()


def test_a_connector_for_another_spark_is_refused(spark, monkeypatch):
    """Classes of another version would fail in the middle of a stream, with a Java error."""
    monkeypatch.setattr(spark, "version", "4.1.1")
    with pytest.raises(SessionError, match=r"is Spark 4\.1\.1, but .* is for 4\.2\.0: .*:4\.1\.1"):
        get_spark()


def _no_such(coordinate):
    raise session.JarsError(f"Maven Central has no {coordinate}: use a version that it has.")


@pytest.mark.long
def test_a_running_session_without_connector_gets_it(kafka, produce):
    """A running session gets the connector, and can then read Kafka and commit offsets."""
    kafka.create_topic("for-added-jars", partitions=1)
    produce("for-added-jars", [b"1", b"2", b"3"])
    program = f"""
from pyspark.sql import SparkSession
SparkSession.builder.master("local[1]").config("spark.ui.enabled", False).getOrCreate()
from helpers.spark import get_spark
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream
spark = get_spark()
counts = []
ssc = new_streaming_context(spark, 1)
stream = KafkaUtils.createDirectStream(ssc, ["for-added-jars"], {{
    "bootstrap.servers": "{kafka.bootstrap_servers}", "auto.offset.reset": "earliest",
    "group.id": "added-jars"}})
stream.foreachBatch(lambda df, batch_id: counts.append(df.count()))
run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)
print("counted", sum(counts))
"""
    run = run_python("-c", program)
    assert run.stdout.strip().endswith("counted 3"), run.stderr[-3000:]
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        (offset,) = admin.list_group_offsets(["added-jars"])["added-jars"].values()
    assert offset.offset == 3


def test_logs_stay_out_of_the_output_and_nothing_is_left(tmp_path):
    """Spark's logs go to a file, and its temporary files are removed at exit."""
    program = (
        "from helpers.spark import *; spark = get_spark(cores=1);"
        "print(spark.range(5).count(), 'WARN' in log_file().read_text())"
    )
    run = run_python("-c", program, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert run.stdout == "5 True\n"
    assert run.stderr == ""
    wait_until(
        lambda: not [path for path in tmp_path.iterdir() if not path.name.startswith("hsperf")]
    )


def test_nothing_is_left_if_all_processes_of_a_service_get_a_signal(tmp_path):
    """A service manager sends SIGTERM also to the process that removes the folder at the end."""
    program = (
        "import psutil; from helpers.spark import scratch; print(scratch.scratch_folder())\n"
        "watcher = psutil.Process(scratch._WATCHERS[0].pid)\n"
        "while not watcher.children(): pass\n"  # it has begun to wait
        "watcher.terminate()"
    )
    run = run_python("-c", program, env={**os.environ, "TMPDIR": str(tmp_path)})
    folder = Path(run.stdout.strip())
    assert folder.parent == tmp_path, run.stderr
    wait_until(lambda: not folder.exists())


def test_spark_home_names_the_spark_that_is_used(tmp_path):
    """The Spark in SPARK_HOME is used instead of the one from PyPI."""
    arrange_spark(Path(pyspark.__file__).parent, tmp_path)
    environment = {**os.environ, "SPARK_HOME": str(tmp_path)}
    program = "import helpers.spark, pyspark; print(pyspark.__file__)"
    run = run_python("-c", program, env=environment)
    assert run.stdout.startswith(f"{tmp_path}/python/pyspark"), run.stderr


def test_a_pyspark_for_another_spark_is_refused(tmp_path):
    """Without the reason, Java's first missing class would be the only message."""
    (tmp_path / "jars").mkdir()
    (tmp_path / "jars" / "spark-core_2.12-3.5.7.jar").touch()
    program = "import pyspark; from helpers.spark import get_spark; get_spark()"
    run = run_python("-c", program, env={**os.environ, "SPARK_HOME": str(tmp_path)})
    last = run.stderr.splitlines()[-1]
    assert f"PySpark {pyspark.__version__} was imported" in last and "is 3.5.7: restart" in last


def test_spark_submits_master_decides_what_is_restricted(monkeypatch):
    """With a YARN master from spark-submit, the driver is not bound to loopback."""
    asked = {}
    submitted = {"spark.master": "yarn", "spark.executor.memory": "8g"}
    monkeypatch.setattr(session, "_submitted_settings", lambda: submitted)
    monkeypatch.setattr(session.SparkContext, "_active_spark_context", None)
    monkeypatch.setattr(session, "_start", lambda settings: asked.update(settings))
    monkeypatch.setattr(session, "_connector_class", lambda spark: object())
    monkeypatch.setattr(session, "_refuse_another_connector", lambda *_: None)
    monkeypatch.setattr(session, "hide_secrets", lambda spark: None)
    monkeypatch.setattr(session, "guard_callbacks", lambda spark: None)
    monkeypatch.setattr(session, "_ship_helpers", lambda spark: None)
    get_spark()
    assert "spark.driver.host" not in asked
    assert asked["spark.master"] == "yarn" and asked["spark.executor.memory"] == "8g"


@pytest.mark.parametrize("name, mode", [("kafka-plans", 0o700), ("something-else", 0o755)])
def test_a_folder_with_settings_is_kept_from_others(spark, tmp_path, caplog, name, mode):
    """A checkpoint is made private; a folder with other files only causes a warning."""
    folder = tmp_path / "checkpoint"
    (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    protect_folder(spark, str(folder))
    assert folder.stat().st_mode & 0o777 == mode
    assert ("chmod 700 it" in caplog.text) == (mode != 0o700)


def test_a_separate_session_changes_nothing_in_the_others(spark):
    """Neither their settings, nor to which session the DataFrame of an RDD belongs."""
    name = "spark.sql.parquet.enableVectorizedReader"
    existing, to_dataframe = get_spark(), RDD.toDF  # perhaps of a query's last batch
    other = separate_session(spark, {name: "false"})
    assert (spark.conf.get(name), other.conf.get(name)) == ("true", "false")
    assert SECRET_SETTINGS in other.conf.get("spark.sql.redaction.options.regex")
    assert get_spark() is existing and RDD.toDF is to_dataframe


def test_settings_that_several_threads_change_return(spark):
    """A session has its own settings again when the last of them is done."""
    name = "spark.sql.shuffle.partitions"
    before, together = spark.conf.get(name), threading.Barrier(4)

    def change():
        for _ in range(20):
            together.wait(60)
            with changed_settings(spark, {name: "7"}):
                assert spark.conf.get(name) == "7"

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(change) for _ in range(4)]:
            done.result(300)
    assert spark.conf.get(name) == before


ENDED = """
import os, signal, sys
from pyspark import SparkContext
from helpers.spark import SessionError, check_running, get_spark

spark = get_spark(cores=1)
spark._jsc.sc().stop()  # as YARN does when it ends an application
try:
    check_running(spark)
except SessionError as error:
    print(error)
spark = get_spark(cores=1)
print(spark.range(3).count())
os.kill(SparkContext._gateway.proc.pid, signal.SIGKILL)
SparkContext._gateway.proc.wait(60)
for _ in range(2):
    try:
        get_spark()
    except SessionError as error:
        print(error)
"""


def test_the_end_of_javas_log_is_in_the_message(monkeypatch, tmp_path):
    """The log's file is removed when a program ends, so its message has the last lines."""
    log = tmp_path / "spark.log"
    log.write_bytes(b"an early line\n" * 100 + b"\x1b[31m# SIGSEGV\x1b[0m\n\xff# Problematic frame")
    monkeypatch.setattr(scratch, "log_file", lambda: log)
    monkeypatch.setattr(java_exit, "log_file", lambda: log)
    told = java_exit.how_java_exited()
    assert re.search(r"restart Python.*Its log ends with: .*# SIGSEGV.*# Problematic frame$", told)
    assert told.isprintable() and len(told) < 1_000 and str(log) not in told


@pytest.mark.long
def test_a_session_that_ended_in_java_is_noticed():
    """After Java's end, `get_spark` starts again, or says that Python must be restarted."""
    run = run_python("-c", ENDED)
    stopped, count, *refused = run.stdout.splitlines()
    assert "this Spark session was stopped" in stopped and count == "3", run.stderr
    assert len(refused) == 2
    assert all(line.startswith("Java exited unexpectedly; ") for line in refused)
    assert all("restart Python" in line for line in refused)
