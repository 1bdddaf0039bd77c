"""The Spark session: the existing one, or a new one with everything that the kit needs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyspark.util
from py4j.java_gateway import JavaObject, JavaPackage
from py4j.protocol import Py4JError
from pyspark import RDD, SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession
from pyspark.sql.utils import is_remote

import helpers
from helpers.kafka_settings import SECRET_SETTINGS, properties
from helpers.spark.callbacks import guard_callbacks
from helpers.spark.errors import JAVA_ERRORS, summary
from helpers.spark.jars import (
    CONNECTOR,
    JarsError,
    archive_option,
    fetch_jars,
    fork_option,
    java_command,
    spark_and_scala,
    spark_home,
    spark_program,
)
from helpers.spark.java_exit import END_SECONDS, how_java_exited, java_has_exited, log_end
from helpers.spark.machine import available_cores
from helpers.spark.scratch import log_file, scratch_folder

# Names of settings with secrets of Kafka and of object stores.
_SECRET = re.compile(
    rf"{SECRET_SETTINGS}|(access|account|encryption)[.-]key|azure\.sas", re.IGNORECASE
)

_REDACTED_OPTIONS = "spark.sql.redaction.options.regex"

# PySpark reads its options for spark-submit from this variable.
SUBMIT_ARGUMENTS = "PYSPARK_SUBMIT_ARGS"

_CONNECTOR_CLASS = "org.apache.spark.sql.kafka010.KafkaSourceProvider"

_DAEMON = "helpers.spark.daemon"

_JAVA_OPTIONS = "spark.driver.extraJavaOptions"

# Memory beside Java's in MB: Java's own, and that of a worker with TensorFlow and the network.
_OVERHEAD, _WORKER = 400, 800

_LOGGER = logging.getLogger(__name__)

# The settings that `changed_settings` has changed, by session and name: how many blocks use them,
# and the session's own values.
_CHANGED: dict[tuple[str, str], tuple[int, str]] = {}
_CHANGING = threading.Lock()


class SessionError(RuntimeError):
    """Spark can't be started or used; the message says what to do."""


def get_spark(
    app_name: str = "Deep learning on a stream",
    master: str | None = None,
    executors: int = 2,
    cores: int | None = None,
    memory: str = "2g",
    config: Mapping[str, object] | None = None,
) -> SparkSession:
    """Return the existing Spark session, or else a new one; either can read Kafka.

    An existing session (such as SWAN's, or one from an earlier cell) keeps its settings, and the
    parameters have no effect. On SWAN without a cluster, a new session has SWAN's settings.

    Parameters
    ----------
    app_name : str
        The name in the Spark UI and in YARN's list of applications.
    master : str, optional
        Where Spark runs: ``yarn`` for a YARN cluster. The default is this machine,
        ``local[cores,4]``; the 4 allows three retries of a task, as on a cluster.
    executors : int
        Number of executors to request from a cluster; no effect on this machine.
    cores : int, optional
        Number of concurrent tasks, on this machine (default: all available cores) or in each
        executor (default: 1).
    memory : str
        Java's memory, such as ``"2g"``: for the single process on this machine, or for each
        executor on a cluster.
    config : mapping, optional
        Further Spark settings, by Spark's names; they override those set here.

    Returns
    -------
    pyspark.sql.SparkSession
        A session with Spark's Kafka connector, and with `helpers` on its executors.

    Raises
    ------
    SessionError
        If Spark doesn't start, Java of an earlier session has died, the session uses Spark Connect,
        the Kafka connector for its version doesn't exist or can't be fetched, or SWAN has a cluster
        and the notebook isn't connected.
    helpers.spark.JarsError
        If Java or Spark's jars are missing.

    Examples
    --------
    >>> spark = get_spark(cores=2, memory="1g")
    >>> spark.range(3).count()
    3
    """
    _refuse_connect()
    if SparkContext._gateway is not None and java_has_exited():
        raise SessionError(how_java_exited())
    context = SparkContext._active_spark_context
    if context is not None and _has_ended(context):  # by Java, as when YARN ends an application
        context.stop()
        context = None
    if context is not None:
        spark = SparkSession.builder.getOrCreate()
    else:
        submitted = {**_submitted_settings(), **_swan_settings()}
        master = {**(config or {}), **submitted}.get("spark.master", master)
        settings = _settings(app_name, master, executors, cores, memory, config or {})
        spark = _start({**settings, **submitted})
    # An existing session, or Java of an earlier one, may have no connector.
    _refuse_another_connector(spark, _connector_class(spark) or _add_connector(spark))
    hide_secrets(spark)
    guard_callbacks(spark)
    _ship_helpers(spark)
    return spark


def check_running(spark: SparkSession) -> None:
    """Raise `SessionError` if a session was stopped, for example by another cell.

    Examples
    --------
    >>> check_running(spark)
    """
    if _has_ended(spark.sparkContext):
        raise SessionError("this Spark session was stopped: start a new one with get_spark().")


def spark_has_ended() -> bool:
    """Return whether Spark was stopped, here or in Java, as when YARN ends an application.

    Examples
    --------
    >>> spark_has_ended()
    False
    """
    context = SparkContext._active_spark_context
    try:
        return context is None or _has_ended(context)
    except (Py4JError, ConnectionError):  # Java has died
        return True


@contextlib.contextmanager
def changed_settings(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """Change settings of a session within a ``with`` block, which others may share.

    The session's own values return when the last block that changes them ends. Whoever changes a
    setting must change it to the same value, and not one that decides how Spark plans a query: it
    would change half-way through the planning of another thread's. Those belong in a
    `separate_session`.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session.
    settings : mapping
        The values, by Spark's names.

    Examples
    --------
    >>> with changed_settings(spark, {"spark.sql.shuffle.partitions": "7"}):
    ...     spark.conf.get("spark.sql.shuffle.partitions")
    '7'
    """
    session = spark._jsparkSession.sessionUUID()
    with _CHANGING:
        for name, value in settings.items():
            uses, before = _CHANGED.get((session, name)) or (0, spark.conf.get(name))
            _CHANGED[session, name] = uses + 1, before
            spark.conf.set(name, value)
    try:
        yield
    finally:
        with _CHANGING:
            for name in settings:
                uses, before = _CHANGED.pop((session, name))
                if uses > 1:
                    _CHANGED[session, name] = uses - 1, before
                else:
                    spark.conf.set(name, before)


def separate_session(spark: SparkSession, settings: Mapping[str, str]) -> SparkSession:
    """Return a further session of the same Spark, whose settings no other session has.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose settings it begins with.
    settings : mapping
        The values, by Spark's names.

    Examples
    --------
    >>> other = separate_session(spark, {"spark.sql.shuffle.partitions": "7"})
    >>> other.conf.get("spark.sql.shuffle.partitions"), other.sparkContext is spark.sparkContext
    ('7', True)
    """
    with _CHANGING:
        to_dataframe = RDD.toDF
        # Not `newSession`, which has none of the settings that were made while Spark ran.
        session = type(spark)(spark.sparkContext, spark._jsparkSession.cloneSession())
        RDD.toDF = to_dataframe  # PySpark would give the DataFrames of all RDDs to the new session
    for name, value in settings.items():
        session.conf.set(name, value)
    return session


def _has_ended(context: SparkContext) -> bool:
    return context._jsc is None or context._jsc.sc().isStopped()


def fetch() -> None:
    """Fetch the Kafka connector's jars, so that the first session needs no network."""
    _connector_jars(*spark_and_scala())


def names_connector() -> bool:
    """Return whether the user's arguments for spark-submit name a Kafka connector.

    Examples
    --------
    >>> names_connector()
    False
    """
    return "spark-sql-kafka" in os.environ.get(SUBMIT_ARGUMENTS, "")


def _settings(
    app_name: str,
    master: str | None,
    executors: int,
    cores: int | None,
    memory: str,
    config: Mapping[str, object],
) -> dict[str, str]:
    """Return the settings of a new session."""
    master = master or f"local[{cores or available_cores()},4]"
    settings = {
        "spark.app.name": app_name,
        "spark.master": master,
        "spark.serializer": "org.apache.spark.serializer.KryoSerializer",
        "spark.ui.showConsoleProgress": "false",
        # The page asks for no password, and any web site could make the browser send the request.
        "spark.ui.killEnabled": "false",
        # Transfer columns to pandas as Arrow batches, not row by row.
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # Batches of 4,096 events fit in the processor's caches: 5 to 10 % faster than 10,000.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
        "spark.sql.session.timeZone": "UTC",
        # Otherwise PySpark makes three calls to Java per expression to record where in the program
        # it was created: half of all calls, and 30 ms per batch.
        "spark.python.sql.dataFrameDebugging.enabled": "false",
        # A few minutes of history in the Spark UI are enough for a stream. With the defaults of a
        # thousand, Java's memory would grow by 5 MB per minute at one batch per second.
        "spark.ui.retainedJobs": "200",
        "spark.ui.retainedStages": "200",
        "spark.sql.ui.retainedExecutions": "200",
        # Records fetched beyond the end of a batch are useful only to the next batch. By default,
        # Spark keeps unused ones for five minutes, which would fill Java's memory.
        "spark.kafka.consumer.fetchedData.cache.timeout": "2s",
        "spark.kafka.consumer.fetchedData.cache.evictorThreadRunInterval": "1s",
    }
    if master.startswith("local"):
        settings["spark.driver.memory"] = memory
        settings["spark.local.dir"] = str(scratch_folder())
        java_options = [f"-Djava.io.tmpdir={scratch_folder()}", *fork_option()]
        java_options += archive_option(spark_program())
        ours = (f'"{each}"' for each in java_options)
        settings[_JAVA_OPTIONS] = " ".join([_site_setting(_JAVA_OPTIONS), *ours]).strip()
        settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = "127.0.0.1"
        # Other users of this machine reach loopback as well. Without it, Spark gives them the data
        # and the tasks, which hold the settings of Kafka's clients. Spark makes the secret itself.
        if re.match(r"local(\[|$)", master):
            settings["spark.authenticate"] = "true"
        # Otherwise the 18th session of a machine, whoever has the others, ends its Java.
        settings["spark.port.maxRetries"] = "1000"
        settings["spark.python.daemon.module"] = _DAEMON
        settings["spark.executorEnv.PYTHONPATH"] = str(Path(helpers.__file__).parent.parent)
    else:
        settings["spark.executor.instances"] = str(executors)
        settings["spark.executor.cores"] = str(cores or 1)
        settings["spark.executor.memory"] = memory
        # Java of an earlier session on this machine would otherwise pass on that session's.
        settings["spark.python.daemon.module"] = "pyspark.daemon"
    return {**settings, **{key: str(value) for key, value in config.items()}}


def _refuse_connect() -> None:
    """Raise `SessionError` if sessions use Spark Connect, which has no access to Java."""
    # Spark 4 introduced this function.
    default_mode = getattr(pyspark.util, "default_api_mode", lambda: "classic")
    mode = os.environ.get("SPARK_API_MODE") or default_mode()
    if "SPARK_REMOTE" in os.environ or is_remote() or mode == "connect":
        raise SessionError(
            "this is Spark Connect, which has no access to Java, and so to neither Kafka's clients "
            "nor DStreams: unset SPARK_REMOTE (and SPARK_API_MODE), restart Python, and name the "
            "cluster as master, as in get_spark(master='yarn')."
        )


def _refuse_another_python_api() -> None:
    """Raise `SessionError` if PySpark is not that of the Spark that will be started."""
    # Spark-submit brings its own PySpark. A container of YARN has no folder of Spark's jars.
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        return
    version, _ = spark_and_scala()
    # A vendor's Spark has further numbers, which its PySpark may lack.
    if version.split(".")[:2] != pyspark.__version__.split(".")[:2]:
        raise SessionError(
            f"PySpark {pyspark.__version__} was imported, and the Spark in {spark_home()} is "
            f"{version}: restart Python, and import helpers before pyspark, so that SPARK_HOME's "
            "PySpark is found; or unset SPARK_HOME."
        )


def _submitted_settings() -> dict[str, str]:
    """Return the settings given to spark-submit; none if this program was started without it."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return {}
    SparkContext._ensure_initialized()  # connects to spark-submit's Java
    return dict(SparkConf(_jvm=SparkContext._jvm).getAll())


def _swan_settings() -> dict[str, str]:
    """Return the settings that CERN SWAN has prepared in this notebook; none elsewhere.

    Raises
    ------
    SessionError
        If SWAN has a cluster: only its button starts a session there, with a ticket and with ports
        that the cluster reaches.
    """
    # Not imported, because workers may not have IPython.
    shell = "IPython" in sys.modules and sys.modules["IPython"].get_ipython()
    if getattr(shell, "kernel", None) is None:
        return {}
    cluster, conf = os.environ.get("SPARK_CLUSTER_NAME"), shell.user_ns.get("swan_spark_conf")
    if cluster:
        raise SessionError(
            f"this notebook isn't connected to SWAN's Spark cluster {cluster}: in the side bar, "
            "open 'Apache Spark' and connect, then run this cell again."
        )
    return dict(conf.getAll()) if conf else {}


def hide_secrets(spark: SparkSession) -> None:
    """Redact secrets in Kafka client options in a session's query plans and the Spark UI.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session, which `get_spark` need not have made.

    Examples
    --------
    >>> hide_secrets(spark)
    """
    shown = spark.conf.get(_REDACTED_OPTIONS)
    if SECRET_SETTINGS not in shown:
        spark.conf.set(_REDACTED_OPTIONS, f"{shown}|{SECRET_SETTINGS}")


def _start(settings: Mapping[str, str]) -> SparkSession:
    """Start Spark with its output redirected to a file instead of notebook cells."""
    java_command()
    _refuse_another_python_api()
    conf = SparkConf().setAll(list(settings.items()))
    is_local = settings["spark.master"].startswith("local")
    if is_local:
        # Otherwise the workers run the first `python3` on PATH.
        os.environ["PYSPARK_PYTHON"] = sys.executable
        os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"  # binds the Spark UI as well
    else:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # a cluster may set another
        # YARN and Kubernetes kill an executor that uses more memory than it requested. Spark
        # requests 10 % more than Java's, which is not enough for workers with TensorFlow.
        workers = int(settings.get("spark.executor.cores", 1))
        if "spark.executor.memoryOverheadFactor" not in settings:
            conf.setIfMissing("spark.executor.memoryOverhead", f"{_OVERHEAD + workers * _WORKER}m")
    gateway = SparkContext._gateway  # exists if an earlier session was stopped
    if gateway is None:
        # A Java that runs already ignores this setting; `_add_connector` adds the jars to it.
        if not names_connector():
            jars = _connector_jars(*spark_and_scala())
            conf.setIfMissing("spark.jars", ",".join([*map(str, jars), *_site_jars(jars)]))
        with log_file().open("ab") as log:
            try:
                # In a new process session, because a kernel that shuts down would wait for Java
                # otherwise, until it is killed. Java ends when this process does.
                how = {"stdout": log, "stderr": log, "start_new_session": True}
                gateway = launch_gateway(_without_secrets(conf), how)
            except PySparkRuntimeError:
                tail = "\n".join(log_file().read_text(errors="replace").splitlines()[-10:])
                raise SessionError(f"Java did not start; its log ends with:\n{tail}") from None
    if is_local and not _ui_stays_here(gateway.jvm.java):
        conf.setIfMissing("spark.ui.enabled", "false")
    try:
        return SparkSession(SparkContext(conf=conf, gateway=gateway))
    except (*JAVA_ERRORS, Py4JError, ConnectionError) as error:
        if not (isinstance(error, JAVA_ERRORS) or java_has_exited(END_SECONDS)):
            raise
        raise SessionError(
            f"Spark did not start on {settings['spark.master']}: {summary(error)} "
            f"Its log ends with: {log_end()}"
        ) from None


def _site_jars(ours: Iterable[Path]) -> list[str]:
    """Return the site's jars, without other versions of the connector's: one of them would win."""
    artifacts = {_artifact(jar.name.split("_", 1)[1]) for jar in ours}
    jars = filter(None, map(str.strip, _site_setting("spark.jars").split(",")))
    names = {jar: _artifact(jar.rsplit("/", 1)[-1]) for jar in jars}
    return [
        jar
        for jar, name in names.items()
        if not artifacts & {name, name.partition("_")[2]}  # Ivy's names begin with the group
    ]


def _site_setting(name: str) -> str:
    """Return a setting of the site's spark-defaults.conf that the kit's would replace; or ''."""
    if "--properties-file" in os.environ.get(SUBMIT_ARGUMENTS, ""):  # Spark reads that instead
        return ""
    folder = os.environ.get("SPARK_CONF_DIR") or spark_home() / "conf"
    try:
        text = Path(folder, "spark-defaults.conf").read_text("utf-8", "replace")
        settings = {each: value for _, each, value in properties(text)}
    except (OSError, ValueError):  # if it exists, Spark reports it
        return ""
    return settings.get(name, "").strip()


def _without_secrets(conf: SparkConf) -> SparkConf:
    """Return settings for Java's command line, which every user of the machine can see.

    Java gets the others from the Spark context. `spark.authenticate` is one of them: Java would
    keep it for later sessions, on clusters that may not have it.
    """
    shown = [
        (name, value)
        for name, value in conf.getAll()
        if name != "spark.authenticate" and not _SECRET.search(name)
    ]
    return SparkConf(loadDefaults=False).setAll(shown)


def _ui_stays_here(java: JavaPackage) -> bool:
    """Return whether the Spark UI would listen on loopback only.

    Only the variable SPARK_LOCAL_IP decides. spark-submit doesn't set it, and the spark-env.sh of a
    site may set another one than this process.
    """
    address = java.lang.System.getenv("SPARK_LOCAL_IP")
    return address is not None and java.net.InetAddress.getByName(address).isLoopbackAddress()


def _connector_jars(spark: str, scala: str) -> list[Path]:
    """Return the connector's jars for a Spark version, without those that Spark already has."""
    coordinate = CONNECTOR.format(scala=scala, spark=spark)
    try:
        jars = fetch_jars(coordinate)
    except JarsError as error:
        raise SessionError(f"Spark {spark} needs a connector to read Kafka. {error}") from None
    # Ivy names a file group_artifact-version.jar; Spark's own folder has artifact-version.jar. A
    # site's Spark may have another version, and an artifact must not be loaded twice.
    spark_has = {_artifact(jar.name) for jar in (spark_home() / "jars").glob("*.jar")}
    return [jar for jar in jars if _artifact(jar.name.split("_", 1)[1]) not in spark_has]


def _artifact(file_name: str) -> str:
    """Return a jar's name without its version: 'slf4j-api' for 'slf4j-api-2.0.17.jar'."""
    return re.sub(r"-\d+\.[^-]*(-[A-Za-z0-9.]+)*\.jar$", "", file_name)


def _connector_class(spark: SparkSession) -> JavaObject | None:
    """Return a class of Spark's Kafka connector; None if a running session can't load it."""
    try:
        loader = spark._jsparkSession.sharedState().jarClassLoader()
        return spark._jvm.java.lang.Class.forName(_CONNECTOR_CLASS, False, loader)
    except Exception:  # py4j wraps Java's ClassNotFoundException
        return None


def _add_connector(spark: SparkSession) -> JavaObject:
    """Add the connector to a running session, where `spark.jars` has no effect; return a class."""
    # A driver on a cluster's machine has no spark-submit, which fetches jars.
    can_fetch = (spark_home() / "bin" / "spark-submit").exists()
    for jar in _connector_jars(spark.version, _scala(spark)) if can_fetch else []:
        spark.sql(f"ADD JAR '{jar.as_uri()}'")
    connector = _connector_class(spark)
    if connector is None:
        raise SessionError(
            "this Spark session has no Kafka connector and can't load one: restart it with "
            f"spark.jars.packages={CONNECTOR.format(scala=_scala(spark), spark=spark.version)}."
        )
    return connector


def _refuse_another_connector(spark: SparkSession, connector: JavaObject) -> None:
    """Raise `SessionError` if the session was started with the connector of another Spark."""
    made_for = connector.getPackage().getImplementationVersion()
    releases = [re.match(r"(\d+\.\d+)\.", version or "") for version in (made_for, spark.version)]
    if all(releases) and releases[0][1] != releases[1][1]:
        raise SessionError(
            f"this is Spark {spark.version}, but its Kafka connector is for {made_for}: restart "
            "the session with spark.jars.packages="
            f"{CONNECTOR.format(scala=_scala(spark), spark=spark.version)}."
        )


def _scala(spark: SparkSession) -> str:
    """Return the version of a running session's Scala, such as '2.13'."""
    return ".".join(spark._jvm.scala.util.Properties.versionNumberString().split(".")[:2])


def _ship_helpers(spark: SparkSession) -> None:
    """Make `import helpers` work on the executors, wherever they are."""
    context = spark.sparkContext
    # Workers on this machine have this package on their path. Each task would read the archive's
    # directory, and each worker would compile its modules.
    if context.getConf().get("spark.python.daemon.module", "") == _DAEMON:
        return
    if any(file.endswith("/helpers.zip") for file in context.listFiles):
        return
    package = Path(helpers.__file__).parent
    if not package.is_dir():  # in an archive, which spark-submit --py-files has sent to all
        return
    file = scratch_folder() / "helpers.zip"  # executors may fetch it as long as Spark runs
    with zipfile.ZipFile(file, "w") as archive:
        for source in package.rglob("*.py"):
            archive.write(source, source.relative_to(package.parent))
    context.addPyFile(str(file))
