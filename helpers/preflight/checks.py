"""What a run needs, one check for each thing: it is there, or the command that mends it is told.

`helpers.preflight.preflight` makes a table of them.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyspark
from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from py4j.protocol import Py4JError
from pyspark import SparkContext
from pyspark.errors import PySparkException

from helpers.broker import (
    ANSWER_SECONDS,
    KAFKA_JARS,
    KAFKA_VERSION,
    LOOPBACK,
    free_port,
    port_is_free,
)
from helpers.kafka_settings import check_address
from helpers.spark import (
    CONNECTOR,
    INSTALL_JAVA,
    JarsError,
    NoSuchJarError,
    fetch_jars,
    java_command,
    spark_and_scala,
)

OLDEST_JAVA = 17
WORKERS_IMPORT = ("numpy", "pandas", "pyarrow", "orjson", "keras", "tensorflow")
PROGRAM_SECONDS = 30
EXECUTORS_SECONDS = 60
BROKER_PORT = 9092

_OLDEST_SPARK = (4, 1)  # the first with `arrow_udf`

_GB = 2**30
# What the broker, the kernel and the workers take beside Spark's own memory. Measured at a run's
# peak: 4.1 GB with MEMORY=2g on 2 cores, 3.1 GB with MEMORY=1g CORES=1.
_MEMORY_BESIDE_SPARK = 2 * _GB
_CORES_IN_THAT = 2
_MEMORY_OF_A_WORKER = 0.6 * _GB  # one a core, with TensorFlow and the network in it
_DISK = _GB  # an estimate: the broker's data and Spark's files of some 100,000 events

_LEAST_MEMORY = _GB + _MEMORY_BESIDE_SPARK
_LESS_MEMORY = "make run MEMORY=1g CORES=1"
_FETCH = "from helpers import broker, spark; broker.fetch(); spark.fetch()"

# It only looks for the modules: importing TensorFlow takes ten seconds. Debian and others mark the
# system's own Python, in which pip refuses to install (PEP 668).
_QUESTION = """
import importlib.util, json, os, sys, sysconfig
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
print(json.dumps({
    "python": sys.executable,
    "version": ".".join(map(str, sys.version_info[:2])),
    "missing": [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None],
    "has_pip": importlib.util.find_spec("pip") is not None,
    "is_systems_own": sys.prefix == sys.base_prefix and os.path.exists(marker),
}))
"""

_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# The names of the limit, of the use, and of the files' cache in it that the kernel gives up when
# memory gets short, in version 2 and version 1.
_CGROUP_NAMES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Check(NamedTuple):
    """One thing that a run needs, and whether it is there.

    Attributes
    ----------
    what : str
        The thing.
    ok : bool
        Whether it is there.
    found : str
        What was found, in one line.
    remedy : str
        The command that mends it; '' if there is nothing to mend.

    Examples
    --------
    >>> Check("Java", False, "no java on PATH", "brew install openjdk@21").remedy
    'brew install openjdk@21'
    """

    what: str
    ok: bool
    found: str
    remedy: str


def check_java() -> Check:
    """Check that the `java` of ``JAVA_HOME``, else of ``PATH``, is 17 or newer.

    Examples
    --------
    >>> check_java().ok
    True
    """
    try:
        command = java_command()
    except JarsError:
        home = os.environ.get("JAVA_HOME")
        found = f"JAVA_HOME is {home}, where there is no bin/java" if home else "no java on PATH"
        return _missing("Java", found, _mend_java())
    version = _java_version(command)
    if not version:
        return _missing("Java", f"{command} doesn't tell its version", _mend_java())
    if not _is_new_enough(version):
        found = f"{version}, but {OLDEST_JAVA} or newer is needed: {command}"
        return _missing("Java", found, _mend_java())
    return _there("Java", f"{version}, {command}")


def check_spark() -> Check:
    """Check PySpark's version: the one of ``requirements.txt``, or that of a site's own Spark.

    Examples
    --------
    >>> check_spark().ok
    True
    """
    pinned, home = _pinned("pyspark"), os.environ.get("SPARK_HOME")
    if home:
        return _check_sites_spark(home, kit=pinned.partition("==")[2])
    if f"pyspark=={pyspark.__version__}" != pinned:
        found = f"PySpark {pyspark.__version__}, but {pinned} is needed"
        return _missing("Spark", found, _python("-m", "pip", "install", pinned))
    return _there("Spark", pyspark.__version__)


def check_connector() -> Check:
    """Check that Spark's Kafka connector is on disk; if it isn't, fetch it, for up to 5 minutes.

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
    try:
        fetch_jars(CONNECTOR.format(scala=scala, spark=spark))
    except (JarsError, OSError) as error:
        return _missing(what, str(error), _mend_jars(error))
    return _there(what, f"for Spark {spark} and Scala {scala}")


def check_worker_python() -> Check:
    """Check the Python of Spark's workers: the driver's version, and what it can't import.

    It is the one of ``PYSPARK_PYTHON``, else this one. If a session on a cluster is active, its
    executors are asked instead, for up to 60 s.

    Examples
    --------
    >>> check_worker_python().ok
    True
    """
    context = SparkContext._active_spark_context
    if context is not None and not re.match(r"local(\[|$)", context.master):
        return _check_executors(context)
    python = os.environ.get("PYSPARK_PYTHON") or sys.executable
    try:
        return _judge(_ask(python))
    except (OSError, ValueError, subprocess.SubprocessError):
        return _missing("workers' Python", f"{python} is no Python that runs", _use_this_python())


def check_broker(bootstrap_servers: str = "") -> Check:
    """Check that a broker answers within 10 s, or that one can be started here.

    Parameters
    ----------
    bootstrap_servers : str
        Addresses of brokers, ``host:port`` separated by commas. Empty: a run starts a broker of its
        own, whose jars are fetched if they aren't on disk, for up to 5 minutes.

    Examples
    --------
    >>> check_broker("127.0.0.1").found
    "'127.0.0.1' is no address of a Kafka broker: write host:port."
    """
    what = "Kafka broker"
    if not bootstrap_servers:
        return _check_brokers_jars()
    host, port = _first_address(bootstrap_servers)
    try:
        check_address(bootstrap_servers)
    except ValueError as error:
        corrected = f"{host}:{port if port.isdecimal() else BROKER_PORT}"
        remedy = _python("-m", "helpers.preflight", "--bootstrap-servers", corrected)
        return _missing(what, str(error), remedy)
    if _answers(bootstrap_servers):
        return _there(what, f"answers at {bootstrap_servers}")
    found = f"no Kafka broker answers at {bootstrap_servers} within {ANSWER_SECONDS} s"
    if not _is_loopback(host):
        return _missing(what, found, "check the address, and that the broker runs there")
    return _missing(what, found, _start_broker(int(port)))


def check_memory(memory: str = "2g", cores: int | None = None) -> Check:
    """Check the free memory of the machine, and of the container if this is one.

    Parameters
    ----------
    memory : str
        Java's memory, as in ``"2g"``. A run takes about 2 GB beside it, and 0.6 GB for each core
        from the third on.
    cores : int, optional
        How many tasks run at a time, each in a worker of its own; by default all cores.

    Examples
    --------
    >>> check_memory("9000g").remedy
    'make run MEMORY=1g CORES=1'
    """
    amount = re.fullmatch(r"(\d+)([kmgt])b?", memory.lower())
    if amount is None:
        remedy = _python("-m", "helpers.preflight", "--memory", "2g")
        return _missing("memory", f"{memory!r} is no amount of memory: write it as in 2g", remedy)
    more_workers = max(0, (cores or os.cpu_count()) - _CORES_IN_THAT)
    needed = int(amount[1]) * 2 ** (10 * "_kmgt".index(amount[2])) + _MEMORY_BESIDE_SPARK
    needed += more_workers * _MEMORY_OF_A_WORKER
    available = min([psutil.virtual_memory().available, *_left_in_cgroups()])
    found = f"{available / _GB:,.1f} GB free, {needed / _GB:,.1f} GB needed"
    if available >= needed:
        return _there("memory", found)
    once = "" if available >= _LEAST_MEMORY else f"  # once {_LEAST_MEMORY / _GB:.0f} GB are free"
    return _missing("memory", found, _LESS_MEMORY + once)


def check_disk() -> Check:
    """Check that the temporary folder can be written to and has 1 GB of space.

    Examples
    --------
    >>> check_disk().ok
    True
    """
    # Python itself passes over a TMPDIR that it can't use, without a word.
    folder = os.environ.get("TMPDIR") or "/tmp"
    problem = _problem_of_folder(folder)
    if not problem:
        return _there("disk", f"{_free_disk(folder) / _GB:,.1f} GB free in {folder}")
    others = ("/tmp", "/var/tmp", str(Path.home()), str(Path.cwd()))
    usable = (other for other in others if not _problem_of_folder(other))
    better = next(usable, "/a/folder/with/space")
    return _missing("disk", problem, f"export TMPDIR={shlex.quote(better)}")


def check_ports(port: int = BROKER_PORT) -> Check:
    """Check that programs of this machine reach each other, and that a port is free or a broker's.

    Parameters
    ----------
    port : int
        The one that must be free: by default that of ``python -m helpers.broker``.

    Examples
    --------
    >>> check_ports(free_port()).ok
    True
    """
    try:
        _connect_to_self()
    except OSError as error:
        found = f"no connection to {LOOPBACK} can be made: {error.strerror}"
        return _missing("ports", found, _start_loopback())
    if port_is_free(port):
        return _there("ports", f"{port} is free")
    if _answers(f"{LOOPBACK}:{port}"):
        return _there("ports", f"a Kafka broker answers at {port}")
    found = f"{port} is taken, and what listens there is no Kafka broker"
    return _missing("ports", found, _start_broker(port))


def _there(what: str, found: str) -> Check:
    return Check(what, True, found, "")


def _missing(what: str, found: str, remedy: str) -> Check:
    return Check(what, False, " ".join(found.split()), remedy)


def _python(*arguments: str) -> str:
    """Return a command for this Python, as a shell takes it."""
    return shlex.join([sys.executable, *arguments])


def _as_root(command: str) -> str:
    """Return a command without `sudo` for root, in whose containers there often is none."""
    return command.replace("sudo ", "") if os.geteuid() == 0 else command


def _java_version(command: str) -> str:
    """Return what a `java` says its version is; '' if it says none."""
    try:
        run = subprocess.run(
            [command, "-version"], capture_output=True, text=True, timeout=PROGRAM_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    version = re.search(r'version "(\d[^"]*)"', run.stderr + run.stdout)
    return version[1] if version else ""


def _is_new_enough(version: str) -> bool:
    return int(re.match(r"\d+", version)[0]) >= OLDEST_JAVA


def _mend_java() -> str:
    """Return the command after which the `java` on PATH is used, and is new enough."""
    forget = ["unset JAVA_HOME"] if os.environ.get("JAVA_HOME") else []
    on_path = shutil.which("java")
    version = on_path and _java_version(on_path)
    install = [] if version and _is_new_enough(version) else [_install_java()]
    return " && ".join(forget + install)


def _install_java() -> str:
    """Return the command that installs Java on this system."""
    for package_manager, command in INSTALL_JAVA.items():
        if shutil.which(package_manager):
            return _as_root(command)
    return "install Java 17 or 21, and put it on PATH"


def _pinned(module: str) -> str:
    """Return the requirement of `requirements.txt` that a module is of, as in 'pyspark==4.2.0'."""
    # TensorFlow's package has another name on some systems: the one that is installed here.
    names = importlib.metadata.packages_distributions().get(module, [module])
    try:
        lines = importlib.metadata.requires("kafka-spark-keras") or []
    except importlib.metadata.PackageNotFoundError:  # used from its folder, not installed
        folder = Path(__file__).resolve().parent.parent
        lines = (folder / "requirements.txt").read_text().splitlines()
    pinned = [re.split(r"[\s;]", line)[0] for line in lines]
    return next(pin for name in (*names, module) for pin in pinned if pin.startswith(f"{name}=="))


def _check_sites_spark(home: str, kit: str) -> Check:
    """Check the Spark of SPARK_HOME against the PySpark that is imported, and the kit's version."""
    try:
        version, _ = spark_and_scala()
    except JarsError as error:
        return _missing("Spark", str(error), "unset SPARK_HOME")
    if not _OLDEST_SPARK <= _release(version) < (int(kit.split(".")[0]) + 1,):
        found = f"Spark {version} in {home}, but one like {kit} is needed"
        return _missing("Spark", found, "unset SPARK_HOME")
    if version.split(".")[:2] != pyspark.__version__.split(".")[:2]:
        found = f"Spark {version} in {home}, but PySpark is {pyspark.__version__}"
        return _missing("Spark", found, "unset SPARK_HOME")
    return _there("Spark", f"{version}, {home}")


def _release(version: str) -> tuple[int, ...]:
    """Return a version's first two numbers, to be compared: (4, 2) for '4.2.0'."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _check_brokers_jars() -> Check:
    """Check that a broker's jars are on disk, or fetch them."""
    try:
        fetch_jars(*KAFKA_JARS)
    except (JarsError, OSError) as error:
        return _missing("Kafka broker", str(error), _mend_jars(error))
    return _there("Kafka broker", f"Kafka {KAFKA_VERSION}, to be started here")


def _mend_jars(error: Exception) -> str:
    """Return the command after which jars can be fetched, from what is missing below them up."""
    for check in (check_java(), check_spark()):
        if not check.ok:
            return check.remedy
    if os.environ.get("SPARK_HOME") and isinstance(error, NoSuchJarError | OSError):
        return "unset SPARK_HOME"  # for the kit's own Spark, whose connector is on Maven Central
    return f"{_python('-c', _FETCH)}  # once the network is there"


def _ask(python: str) -> dict[str, Any]:
    """Return what an interpreter answers to the question."""
    run = subprocess.run(
        [python, "-c", _QUESTION, *WORKERS_IMPORT], capture_output=True, text=True,
        timeout=PROGRAM_SECONDS, stdin=subprocess.DEVNULL, check=True,
    )
    return json.loads(run.stdout)


def _judge(answer: dict[str, Any], where: str = "") -> Check:
    """Return the check of what an interpreter answered to the question."""
    what, python, version = "workers' Python", answer["python"], answer["version"]
    own = ".".join(map(str, sys.version_info[:2]))
    if version != own:
        found = f"{version}, but this is {own}: {python}{where}"
        return _missing(what, found, _use_this_python())
    if not answer["missing"]:
        is_this = python == sys.executable and not where
        return _there(what, f"{version}, {'this one' if is_this else python}{where}")
    found = f"{python}{where} can't import {', '.join(answer['missing'])}"
    if answer["is_systems_own"] and python != sys.executable:
        return _missing(what, found, _use_this_python())
    return _missing(what, found, _install_modules(answer))


def _install_modules(answer: dict[str, Any]) -> str:
    """Return the command that installs what an interpreter can't import."""
    python = answer["python"]
    pip = [python, "-m", "pip"]
    if not answer["has_pip"]:
        pip = [sys.executable, "-m", "pip", "--python", python]
    return shlex.join([*pip, "install", *map(_pinned, answer["missing"])])


def _use_this_python() -> str:
    return f"export PYSPARK_PYTHON={shlex.quote(sys.executable)}"


def _check_executors(context: SparkContext) -> Check:
    """Check the Python of a cluster's executors."""
    what, master = "workers' Python", context.master
    try:
        checks = [_judge(answer, " on an executor") for answer in _ask_executors(context)]
    except TimeoutError:
        found = f"no executor of {master} answers within {EXECUTORS_SECONDS} s"
        fewer = ["make", "run", f"MASTER={master}", "EXECUTORS=1", "CORES=1", "MEMORY=1g"]
        return _missing(what, found, shlex.join(fewer))
    except (Py4JError, PySparkException, OSError, ValueError):
        own = ".".join(map(str, sys.version_info[:2]))
        return _missing(what, f"{master} has no Python {own} that runs", _use_this_python())
    return next((check for check in checks if not check.ok), checks[0])


def _ask_executors(context: SparkContext) -> list[dict[str, Any]]:
    """Return what the executors' interpreters answer to the question, in a job with a deadline."""
    arguments = ["-c", _QUESTION, *WORKERS_IMPORT]
    seconds, tag = PROGRAM_SECONDS, "preflight"

    # Made here because Spark ships such a function whole. For one of the module, the executors
    # would have to import `helpers`, which they may not have yet.
    def ask(_: object) -> Iterator[str]:
        run = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds,
            stdin=subprocess.DEVNULL, check=True,
        )
        yield run.stdout

    def job() -> list[str]:
        context.addJobTag(tag)
        tasks = context.defaultParallelism
        return context.parallelize(range(tasks), tasks).mapPartitions(ask).collect()

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(job)
        try:
            return [json.loads(answer) for answer in answers.result(EXECUTORS_SECONDS)]
        finally:
            context.cancelJobsWithTag(tag)


def _answers(bootstrap_servers: str) -> bool:
    """Tell whether a Kafka broker answers, without naming a topic, which it could forbid."""
    milliseconds = ANSWER_SECONDS * 1000
    try:
        with KafkaAdminClient(
            bootstrap_servers=bootstrap_servers.split(","), bootstrap_timeout_ms=milliseconds,
            request_timeout_ms=milliseconds,
        ) as admin:
            admin.list_topics()
    except (KafkaError, OSError):
        return False
    return True


def _first_address(bootstrap_servers: str) -> tuple[str, str]:
    """Return host and port of the first address, with what is likely where one is missing."""
    host, _, port = bootstrap_servers.split(",")[0].strip().rpartition(":")
    if not host and not port.isdecimal():
        host, port = port, ""
    return host or LOOPBACK, port


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _start_broker(port: int) -> str:
    """Return the command that starts a broker at a port, or at a free one if that is taken."""
    port = port if port and port_is_free(port) else free_port()
    return _python("-m", "helpers.broker", "--port", str(port))


def _connect_to_self() -> None:
    """Open a port and connect to it; opening alone succeeds even where loopback is down."""
    with (
        socket.create_server((LOOPBACK, 0)) as server,
        socket.create_connection(server.getsockname(), timeout=ANSWER_SECONDS),
    ):
        pass


def _start_loopback() -> str:
    """Return the command that brings this machine's loopback interface up."""
    start = "ifconfig lo0 up" if sys.platform == "darwin" else "ip link set lo up"
    return _as_root(f"sudo {start}")


def _left_in_cgroups() -> Iterator[int]:
    """Return how many bytes the limits of this process's container leave, if it is in one."""
    for folder in _memory_cgroups():
        for limit_name, used_name, cache_name in _CGROUP_NAMES:
            try:
                limit = (folder / limit_name).read_text().strip()
                used = int((folder / used_name).read_text())
                statistics = (folder / "memory.stat").read_text()
            except OSError:
                continue
            if limit != "max":
                cache = re.search(rf"^{cache_name} (\d+)$", statistics, re.MULTILINE)
                yield int(limit) - used + int(cache[1] if cache else 0)


def _memory_cgroups() -> Iterator[Path]:
    """Return the folders of the control groups that bound this process, from its own up."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = _CGROUPS / "memory" if controllers else _CGROUPS  # version 1, version 2
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _free_disk(folder: str) -> int:
    return shutil.disk_usage(folder).free


def _problem_of_folder(folder: str) -> str:
    """Return why a folder is of no use for temporary files; '' if it is."""
    try:
        free = _free_disk(folder)
        if free < _DISK:
            return f"{free / _GB:,.1f} GB free in {folder}, {_DISK / _GB:,.1f} GB needed"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} can't be used: {error.strerror}"
