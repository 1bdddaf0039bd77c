"""Check the requirements of a run, and name the command that provides each missing one.

`preflight` returns the checks as a table for a notebook; ``python -m helpers.preflight`` prints it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyspark
from kafka import KafkaAdminClient
from py4j.protocol import Py4JError
from pyspark import SparkContext

import helpers
from helpers.broker import (
    KAFKA_JARS,
    KAFKA_VERSION,
    LOOPBACK,
    BrokerError,
    connecting,
    free_port,
    port_is_free,
    python_settings,
)
from helpers.kafka_settings import ANSWER_SECONDS, connection_settings
from helpers.spark import (
    CONNECTOR,
    INSTALL_JAVA,
    JAVA_ERRORS,
    SUBMIT_ARGUMENTS,
    JarsError,
    NoSuchJarError,
    available_cores,
    available_memory,
    fetch_jars,
    java_command,
    names_connector,
    spark_and_scala,
)

OLDEST_JAVA = 17
WORKERS_IMPORT = ("numpy", "pandas", "pyarrow", "orjson", "msgspec", "keras", "tensorflow")
PROGRAM_SECONDS = 30
WORKERS_SECONDS = 60
BROKER_PORT = 9092

_OLDEST_SPARK = (3, 5)  # the oldest on which scoring was tried
_REQUIREMENTS = Path(helpers.__file__).resolve().parents[1] / "requirements.txt"
_CONNECTORS_JARS = "<spark-sql-kafka-0-10.jar of your site and its dependencies>"
_FETCH = "from helpers import broker, spark; broker.fetch(); spark.fetch()"
_PYTHON_VERSION = "{}.{}".format(*sys.version_info)

_GB = 2**30
# Memory for the broker, the kernel and the workers, in addition to Java's. The peak of a run was
# 4.1 GB with MEMORY=2g on 2 cores, and 3.1 GB with MEMORY=1g CORES=1.
_MEMORY_BESIDE_SPARK = 2 * _GB
_MEMORY_OF_A_WORKER = 0.6 * _GB  # beyond the second, with TensorFlow and the network
_DISK = _GB  # the broker's data and Spark's files for some 100,000 events


class Check(NamedTuple):
    """One requirement of a run, and whether it is met.

    Attributes
    ----------
    what : str
        The requirement.
    ok : bool
        Whether it is met.
    found : str
        What was found, on one line.
    remedy : str
        The command that provides it; '' if nothing is missing.

    Examples
    --------
    >>> Check("Java", False, "no java on PATH", "brew install openjdk@21").remedy
    'brew install openjdk@21'
    """

    what: str
    ok: bool
    found: str
    remedy: str = ""


def preflight(
    bootstrap_servers: str = "",
    memory: str = "2g",
    cores: int | None = None,
    kafka_config: str = "",
) -> pd.DataFrame:
    """Check all requirements of a run, and name the command that provides each missing one.

    Nothing is changed, except that missing jars of Kafka and of the connector are fetched.

    Parameters
    ----------
    bootstrap_servers : str
        The broker that the run will use, as ``host:port``; empty if the run starts a local one.
    memory : str
        Java's memory in the run, such as ``"2g"``.
    cores : int, optional
        Number of concurrent tasks of the run on this machine; by default one per available core.
    kafka_config : str
        A file with settings for a secured Kafka, in Kafka's properties format; empty for none.

    Returns
    -------
    pandas.DataFrame
        One row per `Check`, with its attributes as columns. In a notebook,
        ``preflight().style.format(escape="html")`` shows long commands in full.

    Examples
    --------
    >>> preflight().columns.tolist()
    ['what', 'ok', 'found', 'remedy']
    """
    checks = [
        check_java(),
        check_spark(),
        check_connector(),
        check_worker_python(),
        check_broker(bootstrap_servers, kafka_config),
        check_memory(memory, cores),
        check_disk(),
        Check("ports", True, "none is needed") if bootstrap_servers else check_ports(),
    ]
    return pd.DataFrame(checks)


def main(arguments: list[str] | None = None) -> int:
    """Print a run's requirements and whether they are met; return 1 if one is missing."""
    description = "Check what a run needs, and name the command that provides what is missing."
    parser = argparse.ArgumentParser(prog="python -m helpers.preflight", description=description)
    parser.add_argument(
        "--bootstrap-servers", default="", metavar="host:port", help="the broker of the run"
    )
    parser.add_argument("--memory", default="2g", help="Java's memory; default: %(default)s")
    parser.add_argument("--cores", type=int, help="concurrent tasks; default: one per core")
    parser.add_argument(
        "--kafka-config", default="", metavar="FILE",
        help="settings for Kafka clients, including passwords, in Kafka's properties format",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    table = preflight(
        options.bootstrap_servers, options.memory, options.cores, options.kafka_config
    )
    print(_as_text(table))
    return 0 if table["ok"].all() else 1


def check_java() -> Check:
    """Check that the `java` in ``JAVA_HOME``, otherwise on ``PATH``, is 17 or newer.

    Examples
    --------
    >>> check_java().ok
    True
    """
    home = os.environ.get("JAVA_HOME")
    remedy = "unset JAVA_HOME" if home else _install_java()
    try:
        command = java_command()
    except JarsError:
        found = f"JAVA_HOME is {home}, which has no bin/java" if home else "no java on PATH"
        return _missing("Java", found, remedy)
    version = _java_version(command)
    if int(re.match(r"\d*", version)[0] or 0) < OLDEST_JAVA:
        found = f"{version or 'no version'}, but {OLDEST_JAVA} or newer is needed: {command}"
        return _missing("Java", found, remedy)
    return Check("Java", True, f"{version}, {command}")


def check_spark() -> Check:
    """Check that PySpark's version matches ``requirements.txt``, or the site's Spark if it has one.

    The site's Spark is never to be replaced by another one.

    Examples
    --------
    >>> check_spark().ok
    True
    """
    home = os.environ.get("SPARK_HOME")
    if home:
        return _check_sites_spark(home)
    pinned = re.search(r"^pyspark==\S+", _REQUIREMENTS.read_text(), re.MULTILINE)[0]
    if f"pyspark=={pyspark.__version__}" != pinned:
        found = f"PySpark {pyspark.__version__}, but {pinned} is needed"
        return _missing("Spark", found, _python("-m", "pip", "install", pinned))
    return Check("Spark", True, pyspark.__version__)


def check_connector() -> Check:
    """Check that Spark's Kafka connector is on disk; otherwise fetch it, for up to 5 minutes.

    Examples
    --------
    >>> check_connector().ok
    True
    """
    what = "Kafka connector"
    try:
        spark, scala = spark_and_scala()
    except JarsError as error:
        return _missing(what, str(error), "unset SPARK_HOME")
    found = f"for Spark {spark} and Scala {scala}"
    if names_connector():
        return Check(what, True, f"named in {SUBMIT_ARGUMENTS}")
    return _check_jars(what, found, CONNECTOR.format(scala=scala, spark=spark))


def check_worker_python() -> Check:
    """Check that the workers' Python has the driver's version and the required modules.

    If a session is active, its workers are queried, for up to 60 s. Otherwise this Python is
    checked, which `helpers.spark.get_spark` uses for workers on this machine.

    Examples
    --------
    >>> check_worker_python().ok
    True
    """
    what, context = "workers' Python", SparkContext._active_spark_context
    if context is not None:
        return _check_workers(what, context)
    missing = [name for name in WORKERS_IMPORT if find_spec(name) is None]
    if missing:
        install = _python("-m", "pip", "install", "-r", str(_REQUIREMENTS))
        return _missing(what, f"{sys.executable} can't import {', '.join(missing)}", install)
    return Check(what, True, f"{_PYTHON_VERSION}, this one")


def check_broker(bootstrap_servers: str = "", kafka_config: str = "") -> Check:
    """Check that a broker answers within 15 s, or that one can be started here.

    Parameters
    ----------
    bootstrap_servers : str
        Addresses of brokers, ``host:port`` separated by commas. If empty, the run starts a local
        broker, whose missing jars are fetched, for up to 5 minutes.
    kafka_config : str
        A file with settings for a secured Kafka, in Kafka's properties format; empty for none.

    Examples
    --------
    >>> check_broker("127.0.0.1").found
    "'127.0.0.1' is not the address of a Kafka broker: write host:port."
    """
    what = "Kafka broker"
    if not (bootstrap_servers or kafka_config):
        return _check_jars(what, f"Kafka {KAFKA_VERSION}, to be started here", *KAFKA_JARS)
    try:
        settings = connection_settings(bootstrap_servers, kafka_config)
        refusal = _refusal(settings)
    except ValueError as error:
        remedy = f"write it like {LOOPBACK}:{BROKER_PORT}"
        return _missing(what, str(error), f"correct {kafka_config}" if kafka_config else remedy)
    if not refusal:
        return Check(what, True, f"answers at {bootstrap_servers}")
    found, colon, remedy = refusal.rstrip(".").rpartition(": ")
    if not colon:
        found, remedy = refusal, "check the address, and that the broker is running"
    host, _, port = bootstrap_servers.rpartition(":")
    if host in (LOOPBACK, "localhost") and port_is_free(int(port)):
        remedy = _start_broker(int(port))
    return _missing(what, found, remedy)


def check_memory(memory: str = "2g", cores: int | None = None) -> Check:
    """Check the free memory of the machine.

    Parameters
    ----------
    memory : str
        Java's memory, such as ``"2g"``. A run needs about 2 GB more, and 0.6 GB for each core
        beyond the second.
    cores : int, optional
        Number of concurrent tasks, each in its own worker; by default one per available core.

    Examples
    --------
    >>> check_memory("9000g").remedy
    'make run MEMORY=1g CORES=1  # needs 3 GB'
    """
    amount = re.fullmatch(r"(\d+)([kmgt])b?", memory.lower())
    if amount is None or not int(amount[1]):
        return _missing("memory", f"{memory!r} is not an amount of memory", "write it like 2g")
    needed = int(amount[1]) * 2 ** (10 * "_kmgt".index(amount[2])) + _MEMORY_BESIDE_SPARK
    needed += max(0, (cores or available_cores()) - 2) * _MEMORY_OF_A_WORKER
    available = available_memory()
    found = f"{available / _GB:,.1f} GB free, {needed / _GB:,.1f} GB needed"
    if available >= needed:
        return Check("memory", True, found)
    return _missing("memory", found, "make run MEMORY=1g CORES=1  # needs 3 GB")


def check_disk() -> Check:
    """Check that the temporary folder is writable and has 1 GB of free space.

    Examples
    --------
    >>> check_disk().ok
    True
    """
    # Python silently ignores a TMPDIR that it can't use.
    folder = os.environ.get("TMPDIR") or "/tmp"
    found, has_space = _free_space(folder)
    if has_space:
        return Check("disk", True, found)
    others = ("/tmp", "/var/tmp", str(Path.home()))
    better = next((other for other in others if _free_space(other)[1]), "/a/folder/with/space")
    return _missing("disk", found, f"export TMPDIR={shlex.quote(better)}")


def check_ports(port: int = BROKER_PORT) -> Check:
    """Check that a port is free, or that a broker listens on it.

    Parameters
    ----------
    port : int
        The port; by default that of ``python -m helpers.broker``.

    Examples
    --------
    >>> check_ports(free_port()).ok
    True
    """
    if port_is_free(port):
        return Check("ports", True, f"{port} is free")
    if not _refusal({"bootstrap.servers": f"{LOOPBACK}:{port}"}):
        return Check("ports", True, f"a Kafka broker answers at {port}")
    found = f"{port} is taken by a program that is not a Kafka broker"
    return _missing("ports", found, _start_broker(free_port()))


def _as_text(table: pd.DataFrame) -> str:
    """Return the checks as aligned lines of text, with a remedy below each failed one."""
    width = table["what"].str.len().max()
    lines = []
    for check in table.itertuples():
        lines.append(f"{'ok' if check.ok else 'MISSING':<7}  {check.what:<{width}}  {check.found}")
        if not check.ok:
            lines.append(f"{'':<7}  {'':<{width}}  fix it with: {check.remedy}")
    return "\n".join(lines)


def _missing(what: str, found: str, remedy: str) -> Check:
    return Check(what, False, " ".join(found.split()), remedy)


def _python(*arguments: str) -> str:
    """Return a shell command that runs this Python."""
    return shlex.join([sys.executable, *arguments])


def _java_version(command: str) -> str:
    """Return the version that a `java` reports; '' if it reports none."""
    try:
        run = subprocess.run(
            [command, "-version"], capture_output=True, text=True, timeout=PROGRAM_SECONDS,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "".join(re.findall(r'version "(\d[^"]*)"', run.stderr + run.stdout)[:1])


def _install_java() -> str:
    """Return the command that installs Java on this system."""
    commands = (command for manager, command in INSTALL_JAVA.items() if shutil.which(manager))
    command = next(commands, f"install Java {OLDEST_JAVA} or 21, and put it on PATH")
    # Containers, in which the user is root, often have no sudo.
    return command.replace("sudo ", "") if os.geteuid() == 0 else command


def _check_sites_spark(home: str) -> Check:
    """Check that the Spark in SPARK_HOME is new enough and matches the imported PySpark."""
    try:
        version, _ = spark_and_scala()
    except JarsError as error:
        return _missing("Spark", str(error), "unset SPARK_HOME")
    if _OLDEST_SPARK <= _release(version) == _release(pyspark.__version__):
        return Check("Spark", True, f"{version}, {home}")
    needed = "{}.{} or newer is needed, the same for both".format(*_OLDEST_SPARK)
    found = f"Spark {version} in {home} and PySpark {pyspark.__version__}, but {needed}"
    return _missing("Spark", found, _other_spark(home, version))


def _other_spark(home: str, version: str) -> str:
    """Return how to get along with a site's Spark that is too old or not PySpark's."""
    if _release(version) < _OLDEST_SPARK:
        oldest = "{}.{}".format(*_OLDEST_SPARK)
        return f"set SPARK_HOME to a Spark {oldest} or newer of your site"
    if (Path(home) / "python" / "pyspark").is_dir():
        return "restart Python, and import helpers before pyspark"
    return _python("-m", "pip", "install", f"pyspark~={'{}.{}'.format(*_release(version))}.0")


def _release(version: str) -> tuple[int, ...]:
    """Return a version's first two numbers, such as (4, 2) for '4.2.0'."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _check_jars(what: str, found: str, *coordinates: str) -> Check:
    """Check that jars are on disk; otherwise fetch them."""
    try:
        fetch_jars(*coordinates)
    except (JarsError, OSError) as error:
        remedy = f"{_python('-c', _FETCH)}  # once the network is available"
        if isinstance(error, NoSuchJarError):  # a vendor's Spark has a version of its own
            remedy = f"export {SUBMIT_ARGUMENTS}='--jars {_CONNECTORS_JARS} pyspark-shell'"
        elif os.environ.get("SPARK_HOME") and isinstance(error, OSError):
            remedy = "unset SPARK_HOME"  # it has no spark-submit, so it is not a Spark
        return _missing(what, str(error), check_java().remedy or remedy)
    return Check(what, True, found)


def _check_workers(what: str, context: SparkContext) -> Check:
    """Query a session's workers, with a job that is cancelled at the deadline."""
    modules, tag = WORKERS_IMPORT, "preflight"
    remedy = (
        f"set PYSPARK_PYTHON to a Python {_PYTHON_VERSION} with the packages of requirements.txt "
        "on each machine, such as the one from make pack (docs/clusters.md), and restart Spark"
    )

    # Nested, because Spark serializes a nested function by value. To run a module-level function,
    # the executors would have to import `helpers`, which they may not have yet.
    def ask(_: object) -> Iterator[tuple[str, list[str]]]:
        yield sys.executable, [name for name in modules if find_spec(name) is None]

    deadline = threading.Timer(WORKERS_SECONDS, context.cancelJobsWithTag, [tag])
    context.addJobTag(tag)
    deadline.start()
    try:
        tasks = context.defaultParallelism
        answers = context.parallelize(range(tasks), tasks).mapPartitions(ask).collect()
    except (Py4JError, *JAVA_ERRORS):
        found = f"no worker of {context.master} answers within {WORKERS_SECONDS} s as Python "
        return _missing(what, f"{found} {_PYTHON_VERSION}", remedy)
    finally:
        deadline.cancel()
        context.removeJobTag(tag)
    for python, missing in answers:
        if missing:
            return _missing(what, f"{python} can't import {', '.join(missing)}", remedy)
    return Check(what, True, f"{_PYTHON_VERSION}, {answers[0][0]}")


def _refusal(settings: Mapping[str, str]) -> str:
    """Return why no broker answers, '' if one does; raise `ValueError` if settings are unusable."""
    milliseconds = ANSWER_SECONDS * 1000
    limits = {"bootstrap_timeout_ms": milliseconds, "request_timeout_ms": milliseconds}
    arguments = {**python_settings(settings), **limits}
    try:
        with connecting(settings["bootstrap.servers"]), KafkaAdminClient(**arguments) as admin:
            admin.list_topics()  # without naming one, which ACLs could forbid
    except (BrokerError, OSError) as error:
        return str(error)
    return ""


def _start_broker(port: int) -> str:
    return _python("-m", "helpers.broker", "--port", str(port))


def _free_space(folder: str) -> tuple[str, bool]:
    """Return a folder's free space as text, and whether it is enough for temporary files."""
    try:
        free = shutil.disk_usage(folder).free
        found = f"{free / _GB:,.1f} GB free in {folder}"
        if free < _DISK:
            return f"{found}, {_DISK / _GB:,.1f} GB needed", False
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):  # macOS lacks it
            return f"{folder} is mounted noexec, so Java can't load libraries from it", False
        with tempfile.TemporaryFile(dir=folder):
            return found, True
    except OSError as error:
        return f"{folder} can't be used: {error.strerror}", False


if __name__ == "__main__":
    sys.exit(main())
