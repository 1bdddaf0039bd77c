"""The jars, settings and formatted data folder that a local broker starts with.

To add a broker setting, extend `_broker_settings`.
"""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import uuid
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from helpers.broker import security
from helpers.broker.security import ADMINISTRATOR, LOOPBACK, Passwords
from helpers.spark import archive_option, fetch_jars, java_command, spark_home

KAFKA_VERSION = "4.4.0"
KAFKA_PROGRAM = f"kafka-{KAFKA_VERSION}"
KAFKA_JARS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.5",  # without it, the broker logs nothing
)
START_SECONDS = 120
LOCALE = {"LC_ALL": "C.UTF-8"}  # of Kafka's programs: in it, Java can use a folder of any name

_LOGGING = """
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c{1})%n%throwable{short.message}
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""

_JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Duser.language=en",  # in a Turkish locale, Kafka would not find its names in capitals
)


class BrokerError(RuntimeError):
    """The broker doesn't start or doesn't answer; the message says why."""


def fetch() -> None:
    """Fetch the broker's jars, so that the first start needs no network."""
    fetch_jars(*KAFKA_JARS)


def prepare(
    folder: Path,
    port: int,
    controller_port: int,
    passwords: Passwords | None,
    class_option: str | None = None,
) -> list[str]:
    """Write the broker's settings file, and format its data folder if it is new.

    Parameters
    ----------
    folder : pathlib.Path
        The folder for settings, log and data; it is created if missing.
    port, controller_port : int
        The ports on loopback for clients and for the KRaft controller.
    passwords : Passwords or None
        The passwords of a secured broker; None for an unsecured one.
    class_option : str, optional
        Java's option for an archive of the broker's classes; by default, it uses the one of
        `make setup`.

    Returns
    -------
    list of str
        The command that runs the broker.

    Raises
    ------
    BrokerError
        If Kafka can't format the folder.
    helpers.spark.JarsError
        If Java is missing or the broker's jars can't be fetched.

    Examples
    --------
    >>> command = prepare(getfixture("tmp_path"), 9092, 9093, passwords=None)
    >>> Path(command[-1]).name
    'server.properties'
    """
    folder.mkdir(parents=True, exist_ok=True)
    if passwords:
        security.make_certificate(folder, passwords.store)
    settings = _broker_settings(folder, port, controller_port, passwords)
    file = folder / "server.properties"
    _write_privately(file, "".join(map(_property, settings.items())))
    (folder / "log4j2.properties").write_text(_LOGGING)
    if not (folder / "data" / "meta.properties").exists():
        _format(folder, file, passwords)
    return _java(folder, "kafka.Kafka", str(file), class_option)


def last_lines(log: str) -> str:
    r"""Return the end of a log, for an error message.

    Examples
    --------
    >>> last_lines("starting\nstarted\n")
    'starting\nstarted'
    """
    return "\n".join(log.strip().splitlines()[-15:])


def _broker_settings(
    folder: Path, port: int, controller_port: int, passwords: Passwords | None
) -> dict[str, object]:
    """Return all settings of the broker, by Kafka's names."""
    listener = security.PROTOCOL if passwords else "PLAINTEXT"
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "listeners": f"{listener}://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.bootstrap.servers": f"{LOOPBACK}:{controller_port}",
        "log.dirs": folder / "data",
        "num.partitions": 4,
        # Retention takes effect at once, instead of within five minutes.
        "log.retention.check.interval.ms": 1_000,
        "log.initial.task.delay.ms": 1_000,
        # After a SIGKILL, the controller readmits the same broker only after this time.
        "broker.session.timeout.ms": 3_000,
        "broker.heartbeat.interval.ms": 500,
        # A single broker keeps the only replica, including those of Kafka's internal topics.
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        # ACLs can restrict users, as on other brokers; without ACLs, everything is allowed.
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
        # A group on one laptop needn't wait for other members to join.
        "group.initial.rebalance.delay.ms": 0,
    }
    if passwords:
        settings |= security.broker_settings(folder, passwords)
    return settings


def _format(folder: Path, settings: Path, passwords: Passwords | None) -> None:
    """Format an empty data folder, which Kafka requires before the first start."""
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    arguments = ["format", "--standalone", f"--cluster-id={cluster_id}", "--config", str(settings)]
    if passwords:
        administrator = f"name={ADMINISTRATOR},password={passwords.administrator}"
        arguments += ["--add-scram", f"{security.MECHANISM}=[{administrator}]"]
    # In a file, one per line, because other users can see the command line.
    file = folder / "format.arguments"
    _write_privately(file, "\n".join(arguments))
    run = subprocess.run(
        _java(folder, "kafka.tools.StorageTool", f"@{file}"),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS,
        env=os.environ | LOCALE,
    )  # fmt: skip
    if run.returncode != 0:
        output = last_lines(run.stdout + run.stderr)
        raise BrokerError(f"{folder} can't be formatted:\n{output}")


def _property(setting: tuple[str, object]) -> str:
    """Return a setting as a line of a properties file, which Java reads as Latin-1."""
    name, value = setting
    text = str(value).replace("\\", "\\\\").encode("utf-16-be", "surrogatepass")
    units = [int.from_bytes(text[at : at + 2]) for at in range(0, len(text), 2)]
    escaped = "".join(chr(unit) if unit < 128 else rf"\u{unit:04x}" for unit in units)
    return f"{name}={escaped}\n"


def _write_privately(file: Path, text: str) -> None:
    """Write a file that only this user can read, since it may contain passwords."""
    file.touch(mode=0o600)
    file.write_text(text)


def _java(
    folder: Path, main_class: str, argument: str, class_option: str | None = None
) -> list[str]:
    """Return the command that runs one of Kafka's programs."""
    jars = [*fetch_jars(*KAFKA_JARS), _scala_library()]
    options = [
        *_JVM_OPTIONS,
        *([class_option] if class_option else archive_option(KAFKA_PROGRAM)),
        f"-Djava.io.tmpdir={folder}",
        f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}",
    ]
    class_path = os.pathsep.join(map(str, jars))
    return [java_command(), *options, "-cp", class_path, main_class, argument]


def _scala_library() -> Path:
    """Return Kafka's Scala, from PySpark's jars; a site's Spark may have an older one."""
    homes = [spark_home()]
    with contextlib.suppress(PackageNotFoundError):
        homes.insert(0, Path(str(distribution("pyspark").locate_file("pyspark"))))
    for home in homes:
        for jar in home.glob("jars/scala-library-2.13.*.jar"):
            return jar
    raise BrokerError(
        f"a local broker needs Scala 2.13, and the Spark in {homes[0]} has none: use a running "
        "broker (bootstrap_servers), or install PySpark beside it, as in requirements.txt."
    )
