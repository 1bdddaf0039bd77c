"""The Spark session: the existing one, or a new one with all that the kit needs."""

from __future__ import annotations

import logging
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

import helpers
from helpers.kafka_settings import SECRET_SETTINGS
from helpers.spark.jars import (
    CONNECTOR,
    JarsError,
    fetch_jars,
    java_command,
    spark_and_scala,
    spark_home,
)
from helpers.spark.scratch import log_file, scratch_folder

_REDACTED_OPTIONS = "spark.sql.redaction.options.regex"

_CONNECTOR_CLASS = "org.apache.spark.sql.kafka010.KafkaSourceProvider"

_LOGGER = logging.getLogger(__name__)


class SessionError(RuntimeError):
    """Spark can't be started or used as it is, with what to do about it."""


def get_spark(
    app_name: str = "Deep learning on a stream",
    master: str | None = None,
    executors: int = 2,
    cores: int | None = None,
    memory: str = "2g",
    config: Mapping[str, object] | None = None,
) -> SparkSession:
    """Return the Spark session that exists, otherwise a new one; either can read Kafka.

    A session that exists (on SWAN the connector of the notebook made it, elsewhere an earlier cell)
    keeps its settings, whatever the parameters say.

    Parameters
    ----------
    app_name : str
        The name in Spark's web page and in YARN's list.
    master : str, optional
        Where Spark runs: by default on this machine, ``local[cores,4]``, where a task that fails
        gets four tries as on a cluster. ``yarn`` for a YARN cluster.
    executors : int
        How many executors a cluster is asked for; of no effect on this machine.
    cores : int, optional
        How many tasks run at a time, on this machine (default: all its cores) or in each executor
        (default: 1).
    memory : str
        Java's memory, as in ``"2g"``: of the one process on this machine, of each executor else.
    config : mapping, optional
        More of Spark's settings, by Spark's names; they win over those made here.

    Returns
    -------
    pyspark.sql.SparkSession
        A session with Spark's Kafka connector, and with `helpers` on its executors.

    Raises
    ------
    SessionError
        If Spark doesn't start, or there is no Kafka connector for its version.
    helpers.spark.JarsError
        If Java or Spark's own jars are missing, or the connector can't be fetched.

    Examples
    --------
    >>> spark = get_spark(cores=2, memory="1g")
    >>> spark.range(3).count()
    3
    """
    if SparkContext._active_spark_context is not None:
        spark = SparkSession.builder.getOrCreate()
        if not _has_connector(spark):
            _add_connector(spark)
    else:
        submitted = _submitted_settings()
        master = submitted.get("spark.master", master)
        settings = _settings(app_name, master, executors, cores, memory, config or {})
        spark = _start({**settings, **submitted})
    _hide_secrets(spark)
    _ship_helpers(spark)
    return spark


def root_cause(error: Py4JJavaError) -> JavaObject:
    """Return the Java exception that was first, which the others were wrapped around."""
    cause = error.java_exception
    while cause.getCause() is not None:
        cause = cause.getCause()
    return cause


def fetch() -> None:
    """Fetch the Kafka connector's jars, so that the first session needs no network."""
    _connector_jars(*spark_and_scala())


def _settings(
    app_name: str,
    master: str | None,
    executors: int,
    cores: int | None,
    memory: str,
    config: Mapping[str, object],
) -> dict[str, str]:
    """Return the settings of a new session."""
    master = master or f"local[{cores or os.cpu_count()},4]"
    settings = {
        "spark.app.name": app_name,
        "spark.master": master,
        "spark.serializer": "org.apache.spark.serializer.KryoSerializer",
        "spark.jars": ",".join(map(str, _connector_jars(*spark_and_scala()))),
        "spark.ui.showConsoleProgress": "false",
        # Columns go to pandas as Arrow batches, not row by row.
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # Batches of 4,096 events stay in the processor's caches: 5 to 10 % faster than 10,000.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
        "spark.sql.session.timeZone": "UTC",
        # What Spark's web page shows of the past: of a stream, minutes are enough. Up to the
        # default, a thousand of each, Java's memory grows by 5 MB a minute at a batch a second.
        "spark.ui.retainedJobs": "200",
        "spark.ui.retainedStages": "200",
        "spark.sql.ui.retainedExecutions": "200",
        # Records fetched beyond a batch's end are of use to the next batch only, and would fill
        # Java's memory if they were kept for five minutes: those of retried batches, for instance.
        "spark.kafka.consumer.fetchedData.cache.timeout": "2s",
        "spark.kafka.consumer.fetchedData.cache.evictorThreadRunInterval": "1s",
    }
    if master.startswith("local"):
        settings["spark.driver.memory"] = memory
        settings["spark.local.dir"] = str(scratch_folder())
        settings["spark.driver.extraJavaOptions"] = f"-Djava.io.tmpdir={scratch_folder()}"
        settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = "127.0.0.1"
    else:
        settings["spark.executor.instances"] = str(executors)
        settings["spark.executor.cores"] = str(cores or 1)
        settings["spark.executor.memory"] = memory
    return {**settings, **{key: str(value) for key, value in config.items()}}


def _submitted_settings() -> dict[str, str]:
    """Return the settings that spark-submit was given; none if it didn't start this program."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return {}
    SparkContext._ensure_initialized()  # connects to spark-submit's Java
    return dict(SparkConf(_jvm=SparkContext._jvm).getAll())


def _hide_secrets(spark: SparkSession) -> None:
    """Keep secrets in options of Kafka's clients out of plans and of Spark's web page."""
    shown = spark.conf.get(_REDACTED_OPTIONS)
    if SECRET_SETTINGS not in shown:
        spark.conf.set(_REDACTED_OPTIONS, f"{shown}|{SECRET_SETTINGS}")


def _start(settings: Mapping[str, str]) -> SparkSession:
    """Start Spark with its output going to a file, not to the cells of a notebook."""
    java_command()
    conf = SparkConf().setAll(list(settings.items()))
    is_local = settings["spark.master"].startswith("local")
    if is_local:
        # Otherwise the workers run whatever `python3` is first on PATH.
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # Spark's web page, too, is for here
    else:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # a cluster may have its own
    gateway = SparkContext._gateway  # there is one where an earlier session was stopped
    if gateway is None:
        with log_file().open("ab") as log:
            try:
                # In a session of its own: a kernel that shuts down waits in vain for children of
                # its own session, until it is killed. Java ends when this process does.
                how = {"stdout": log, "stderr": log, "start_new_session": True}
                gateway = launch_gateway(conf, how)
            except PySparkRuntimeError:
                tail = "\n".join(log_file().read_text(errors="replace").splitlines()[-10:])
                raise SessionError(f"Java did not start for Spark; it said:\n{tail}") from None
    # Spark's web page is open to the network unless its Java was started with this variable, as
    # spark-submit's wasn't; no setting does the same.
    if is_local and gateway.jvm.java.lang.System.getenv("SPARK_LOCAL_IP") is None:
        conf.setIfMissing("spark.ui.enabled", "false")
    try:
        spark = SparkSession(SparkContext(conf=conf, gateway=gateway))
    except Py4JJavaError as error:
        reason = root_cause(error).getMessage()
        raise SessionError(
            f"Spark did not start on {settings['spark.master']}: {reason} More is in {log_file()}."
        ) from None
    if not _has_connector(spark):  # the gateway was launched without it
        _add_connector(spark)
    return spark


def _connector_jars(spark: str, scala: str) -> list[Path]:
    """Return the connector's jars for a Spark, without those that Spark has anyway."""
    coordinate = CONNECTOR.format(scala=scala, spark=spark)
    try:
        jars = fetch_jars(coordinate)
    except JarsError as error:
        raise SessionError(f"Spark {spark} needs a connector to read Kafka. {error}") from None
    # Ivy names a file group_artifact-version.jar; Spark's own folder has artifact-version.jar, and
    # a site's Spark may have another version, which must not come twice.
    spark_has = {_artifact(jar.name) for jar in (spark_home() / "jars").glob("*.jar")}
    return [jar for jar in jars if _artifact(jar.name.split("_", 1)[1]) not in spark_has]


def _artifact(file_name: str) -> str:
    """Return a jar's name without its version: 'slf4j-api' of 'slf4j-api-2.0.17.jar'."""
    return re.sub(r"-\d+\.[^-]*(-[A-Za-z0-9.]+)*\.jar$", "", file_name)


def _has_connector(spark: SparkSession) -> bool:
    """Tell whether a running session can load Spark's Kafka connector."""
    jvm = spark._jvm
    loader = spark._jsparkSession.sharedState().jarClassLoader()
    try:
        jvm.java.lang.Class.forName(_CONNECTOR_CLASS, False, loader)
    except Exception:  # py4j wraps Java's ClassNotFoundException
        return False
    return True


def _add_connector(spark: SparkSession) -> None:
    """Add the connector to a session that runs already, where `spark.jars` comes too late."""
    scala = ".".join(spark._jvm.scala.util.Properties.versionNumberString().split(".")[:2])
    for jar in _connector_jars(spark.version, scala):
        spark.sql(f"ADD JAR '{jar.as_uri()}'")
    if not _has_connector(spark):
        raise SessionError(
            "this Spark session has no Kafka connector and can't take one: restart it with "
            f"spark.jars.packages={CONNECTOR.format(scala=scala, spark=spark.version)}."
        )


def _ship_helpers(spark: SparkSession) -> None:
    """Make `import helpers` work on the executors, wherever they are."""
    context = spark.sparkContext
    if any(file.endswith("/helpers.zip") for file in context.listFiles):
        return
    package = Path(helpers.__file__).parent
    file = scratch_folder() / "helpers.zip"  # executors fetch it for as long as Spark runs
    with zipfile.ZipFile(file, "w") as archive:
        for source in package.rglob("*.py"):
            archive.write(source, source.relative_to(package.parent))
    context.addPyFile(str(file))
