"""The Spark session: the one that is there, or a new one, ready for Kafka and for `helpers`."""

import os
import sys
import zipfile
from pathlib import Path

import py4j
import pyspark
import pytest
from kafka import KafkaAdminClient
from processes import run_python, wait_until

from helpers import session
from helpers.session import SessionError, get_spark, protect_folder


def test_the_existing_session_is_used(spark):
    """Otherwise a second cell, or SWAN's own session, would get a second Spark."""
    assert get_spark(app_name="another").sparkContext is spark.sparkContext


def test_a_task_has_four_tries_on_the_laptop_too(spark):
    """Otherwise one killed worker would fail the job."""
    assert spark.sparkContext.master == "local[2,4]"


def test_workers_run_this_python_and_import_helpers(spark):
    """Otherwise the workers would fail with 'No module named numpy' or '... helpers'."""

    def look(_):
        import helpers.higgs

        yield sys.executable, len(helpers.higgs.FEATURES)

    assert set(spark.sparkContext.parallelize(range(2), 2).mapPartitions(look).collect()) == {
        (sys.executable, 30)
    }


def test_settings_of_a_new_session():
    """Otherwise a YARN cluster would not get what the settings cell asks for."""
    settings = session._settings("name", "yarn", 5, 3, "4g", {"spark.locality.wait": 0})
    assert settings["spark.master"] == "yarn"
    assert settings["spark.executor.instances"] == "5"
    assert "spark.dynamicAllocation.enabled" not in settings  # the cluster's own choice stands
    assert settings["spark.executor.cores"] == "3"
    assert settings["spark.executor.memory"] == "4g"
    assert settings["spark.locality.wait"] == "0"
    assert settings["spark.serializer"].endswith("KryoSerializer")
    assert "spark-sql-kafka-0-10" in settings["spark.jars"]
    assert "spark.driver.host" not in settings  # executors elsewhere must find the driver


def test_a_spark_without_connector_is_said_at_once(monkeypatch, tmp_path):
    """Otherwise the first read would fail with 'Failed to find data source: kafka'."""
    monkeypatch.setattr(session, "fetch_jars", lambda coordinate: _no_such(coordinate))
    with pytest.raises(SessionError, match=r"Spark 9\.9\.9 needs a connector to read Kafka\."):
        session._connector_jars("9.9.9", "2.13")


def _no_such(coordinate):
    raise session.JarsError(f"Maven Central has no {coordinate}: use a version that it has.")


def test_a_running_session_without_connector_gets_it(kafka, produce):
    """Otherwise a session that a site's kernel made could not read Kafka."""
    kafka.create_topic("for-added-jars", partitions=1)
    produce("for-added-jars", [b"1", b"2", b"3"])
    program = f"""
from pyspark.sql import SparkSession
SparkSession.builder.master("local[1]").config("spark.ui.enabled", False).getOrCreate()
from helpers.session import get_spark
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
    """Otherwise cells would be full of Java's warnings, and /tmp of Spark's folders."""
    program = (
        "from helpers.session import *; spark = get_spark(cores=1);"
        "print(spark.range(5).count(), 'WARN' in log_file().read_text())"
    )
    run = run_python("-c", program, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert run.stdout == "5 True\n"
    assert run.stderr == ""
    wait_until(
        lambda: not [path for path in tmp_path.iterdir() if not path.name.startswith("hsperf")]
    )


def test_spark_home_names_the_spark_that_is_used(tmp_path):
    """Otherwise SWAN's or a cluster's own Spark would be passed over for the one from PyPI."""
    package = Path(pyspark.__file__).parent
    (tmp_path / "python" / "lib").mkdir(parents=True)
    (tmp_path / "python" / "pyspark").symlink_to(package)
    (tmp_path / "jars").symlink_to(package / "jars")
    (tmp_path / "bin").symlink_to(package / "bin")
    with zipfile.ZipFile(tmp_path / "python" / "lib" / "py4j-0-src.zip", "w") as archive:
        for source in Path(py4j.__file__).parent.glob("*.py"):
            archive.write(source, f"py4j/{source.name}")
    environment = {**os.environ, "SPARK_HOME": str(tmp_path)}
    program = "import helpers.session, pyspark; print(pyspark.__file__)"
    run = run_python("-c", program, env=environment)
    assert run.stdout.startswith(f"{tmp_path}/python/pyspark"), run.stderr


def test_spark_submits_master_decides_what_is_restricted(monkeypatch):
    """A driver that a cluster's executors must find isn't put on loopback."""
    asked = {}
    submitted = {"spark.master": "yarn", "spark.executor.memory": "8g"}
    monkeypatch.setattr(session, "_submitted_settings", lambda: submitted)
    monkeypatch.setattr(session.SparkContext, "_active_spark_context", None)
    monkeypatch.setattr(session, "_start", lambda settings: asked.update(settings))
    monkeypatch.setattr(session, "_hide_secrets", lambda spark: None)
    monkeypatch.setattr(session, "_ship_helpers", lambda spark: None)
    get_spark()
    assert "spark.driver.host" not in asked
    assert asked["spark.master"] == "yarn" and asked["spark.executor.memory"] == "8g"


@pytest.mark.parametrize("name, mode", [("kafka-plans", 0o700), ("something-else", 0o755)])
def test_a_folder_with_settings_is_kept_from_others(spark, tmp_path, caplog, name, mode):
    """A checkpoint has passwords in it; a folder that isn't Spark's alone is left as it is."""
    folder = tmp_path / "checkpoint"
    (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    protect_folder(spark, str(folder))
    assert folder.stat().st_mode & 0o777 == mode
    assert ("chmod 700 it" in caplog.text) == (mode != 0o700)
