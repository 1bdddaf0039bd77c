"""A real Apache Kafka broker on this machine, for as long as a `with` block lasts.

    with LocalKafka() as kafka:
        kafka.create_topic("Machine_Learning", partitions=4)
        ...  # produce to and consume from kafka.bootstrap_servers

In a terminal of its own: ``python -m helpers.broker --port 9092``.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from kafka.errors import KafkaError, TopicAlreadyExistsError

from helpers.broker import security as secured
from helpers.kafka_settings import check_address
from helpers.spark import fetch_jars, java_command, spark_home

KAFKA_VERSION = "4.4.0"
KAFKA_JARS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.5",  # without it the broker logs nothing
)
LOOPBACK = "127.0.0.1"
START_SECONDS = 60
STOP_SECONDS = 30
ANSWER_SECONDS = 10

# The shell becomes the broker (`exec` keeps the process id, $$), and leaves a watcher behind that
# reads from a pipe which this Python process holds. A line in the pipe dismisses the watcher. The
# end of the pipe means that this process is gone, however it went: then the watcher kills the
# broker and removes its temporary folder ($1, empty if the folder is to stay).
_START_BROKER_WATCHED = """
temporary_folder=$1; shift
exec 3<&0
(
    read -r line <&3 && exit 0
    kill -9 $$
    test -z "$temporary_folder" && exit 0
    for attempt in 1 2 3 4 5; do rm -rf "$temporary_folder" && exit 0; sleep 1; done
) > /dev/null 2>&1 &
exec "$@" < /dev/null 3<&-
"""

_LOGGING = """
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c{1})%n%throwable{short.message}
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
"""

_JVM_OPTIONS = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


ADMINISTRATOR = "admin"


class _Passwords:
    """The passwords of a secured broker: its own, its key's, and its administrator's."""

    def __init__(self) -> None:
        self.broker, self.store, self.administrator = (secured.new_password() for _ in range(3))


class BrokerError(RuntimeError):
    """The broker did not start, or doesn't answer; the message says why."""


class LocalKafka:
    """An Apache Kafka broker in one process (KRaft, no ZooKeeper), on loopback only.

    Parameters
    ----------
    port : int, optional
        The port for clients; a free one by default.
    folder : str or pathlib.Path, optional
        Where its data is kept. A broker that is given the folder of an earlier one continues with
        its data. By default a temporary folder that is removed at the end.
    security : str, optional
        ``"SASL_SSL"`` for a secured broker: TLS with a certificate of its own, users who sign in
        with SCRAM-SHA-512, and nothing allowed but what ACLs allow. Such a broker needs a temporary
        folder.

    Attributes
    ----------
    bootstrap_servers : str
        What clients connect to, as ``host:port``.
    log_file : pathlib.Path
        What the broker has logged since its last start.

    Raises
    ------
    BrokerError
        If the port is taken, or the broker doesn't answer within 60 s of its start; the message
        ends with its own last log lines.
    ValueError
        If the port is not between 1 and 65535, or `security` is no such thing.
    helpers.spark.JarsError
        If Java is missing or the broker's jars can't be fetched.

    Notes
    -----
    When the Python process ends, the broker ends, even if Python is killed.

    Examples
    --------
    >>> with LocalKafka() as kafka:
    ...     kafka.create_topic("Machine_Learning", partitions=4)
    ...     kafka.topics()
    ['Machine_Learning']
    """

    def __init__(
        self,
        port: int | None = None,
        folder: str | Path | None = None,
        security: str | None = None,
    ) -> None:
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"port {port} is impossible: use one between 1024 and 65535.")
        if security not in (None, secured.PROTOCOL):
            raise ValueError(f"security is {security!r}: it must be 'SASL_SSL', or None.")
        if security and folder is not None:
            raise ValueError("a secured broker keeps its users' passwords in memory: no folder=.")
        self._passwords = _Passwords() if security else None
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(
                prefix="kafka-", ignore_cleanup_errors=True
            )
        self._folder = Path(folder or self._temporary.name).absolute()
        self._port = port if port is not None else free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_run = False
        self.bootstrap_servers = f"{LOOPBACK}:{self._port}"
        self.log_file = self._folder / "broker.log"

    def __repr__(self) -> str:
        state = "running" if self._process else "stopped"
        secure = " SASL_SSL" if self._passwords else ""
        return f"<LocalKafka {KAFKA_VERSION} {self.bootstrap_servers}{secure} {state}>"

    @property
    def settings(self) -> dict[str, str]:
        """A client's settings, by Kafka's own names; of a secured broker, the administrator's.

        Examples
        --------
        >>> with LocalKafka() as kafka:
        ...     list(kafka.settings)
        ['bootstrap.servers']
        """
        if self._passwords is None:
            return {"bootstrap.servers": self.bootstrap_servers}
        return self._settings_of(ADMINISTRATOR, self._passwords.administrator)

    def __enter__(self) -> LocalKafka:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._remove_folder()

    def start(self) -> LocalKafka:
        """Start the broker, with the data that it had, and return when it answers.

        Returns
        -------
        LocalKafka
            This broker. If it runs already, nothing happens.

        Raises
        ------
        BrokerError
            If the port is taken or it doesn't answer within 60 s.
        """
        if self._process is not None:
            return self
        try:
            self._check_port()
            self._launch()
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            if not self._has_run:  # otherwise there is data, which stays for another try
                self._remove_folder()
            raise
        self._has_run = True
        return self

    def stop(self) -> None:
        """End the broker in order: everything is on disk afterwards. Its data stays for `start`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the broker as a power cut would (SIGKILL). Its data stays for `start`."""
        self._end(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until the broker ends by itself, and return its exit code.

        Raises
        ------
        BrokerError
            If it ended with an error; the message ends with its own last log lines.
        """
        code = self._process.wait()
        if code != 0:
            raise BrokerError(f"the broker ended ({code}); its last log lines:\n{self._log_tail()}")
        return code

    def create_topic(
        self, name: str, partitions: int = 4, config: Mapping[str, object] | None = None
    ) -> None:
        """Create a topic, and return when it can be written to. An existing one is left as it is.

        Parameters
        ----------
        name : str
            The topic's name.
        partitions : int
            Into how many partitions it is split: as many can be read at the same time.
        config : mapping, optional
            The topic's settings by Kafka's names, such as ``{"retention.ms": 3_600_000}``.

        Raises
        ------
        kafka.errors.KafkaError
            If the broker refuses the name or a setting.

        Examples
        --------
        >>> with LocalKafka() as kafka:
        ...     kafka.create_topic("events", partitions=1, config={"compression.type": "zstd"})
        """
        settings = {key: str(value) for key, value in (config or {}).items()}
        topic = {
            "num_partitions": partitions, "replication_factor": 1, "assignments": {},
            "configs": settings,
        }
        with _admin(self.settings) as admin:
            with contextlib.suppress(TopicAlreadyExistsError):
                admin.create_topics({name: topic})
            _poll(lambda: _has_leaders(admin, name), START_SECONDS, f"topic {name} has no leader")

    def add_user(self, name: str) -> dict[str, str]:
        """Add a user to a secured broker, with a new password, and return a client's settings.

        Parameters
        ----------
        name : str
            The user, who may do nothing yet; see `allow`.

        Returns
        -------
        dict of str to str
            By Kafka's own names. `helpers.broker.python_settings` makes arguments of kafka-python
            of them.

        Raises
        ------
        BrokerError
            If the broker refuses.

        Examples
        --------
        >>> with LocalKafka(security="SASL_SSL") as kafka:
        ...     reader = kafka.add_user("reader")
        ...     kafka.allow("reader", ["READ", "DESCRIBE"], topic="events")
        ...     kafka.allow("reader", ["READ"], group="scoring")
        >>> reader["security.protocol"], reader["sasl.mechanism"]
        ('SASL_SSL', 'SCRAM-SHA-512')
        """
        password = secured.new_password()
        user = UserScramCredentialUpsertion(name, ScramMechanism.SCRAM_SHA_512, password)
        with _admin(self.settings) as admin:
            refusals = admin.alter_user_scram_credentials([user])
        if refusals.get(name):
            raise BrokerError(f"user {name!r} can't be added: {refusals[name]}.")
        return self._settings_of(name, password)

    def allow(
        self, user: str, operations: Iterable[str], topic: str = "", group: str = ""
    ) -> None:
        """Allow a user of a secured broker something, on one topic or for one consumer group.

        Parameters
        ----------
        user : str
            The user.
        operations : iterable of str
            By Kafka's names, such as ``READ``, ``WRITE``, ``DESCRIBE``, ``CREATE``.
        topic, group : str
            The name of one of them; ``*`` for all.
        """
        kind = ResourceType.TOPIC if topic else ResourceType.GROUP
        rules = [
            ACL(
                principal=f"User:{user}", host="*", operation=ACLOperation[operation],
                permission_type=ACLPermissionType.ALLOW,
                resource_pattern=ResourcePattern(kind, topic or group),
            )
            for operation in operations
        ]  # fmt: skip
        with _admin(self.settings) as admin:
            admin.create_acls(rules)

    def topics(self) -> list[str]:
        """Return the names of the topics, sorted, without Kafka's internal ones.

        Examples
        --------
        >>> with LocalKafka() as kafka:
        ...     kafka.topics()
        []
        """
        with _admin(self.settings) as admin:
            return sorted(name for name in admin.list_topics() if not name.startswith("__"))

    def _check_port(self) -> None:
        """Say at once that the port is taken, rather than in the broker's log after seconds."""
        if not port_is_free(self._port):
            raise BrokerError(
                f"port {self._port} is in use: stop what listens there, or choose another port."
            )

    def _launch(self) -> None:
        """Write the settings, format the folder if it is new, and start the process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = self._folder / "server.properties"
        settings.touch(mode=0o600)  # a secured broker has passwords in it
        if self._passwords:
            secured.make_certificate(self._folder, self._passwords.store)
        settings.write_text(self._properties(controller_port=free_port()))
        (self._folder / "log4j2.properties").write_text(_LOGGING)
        data = self._folder / "data"
        if not (data / "meta.properties").exists():
            self._format(settings)
        watched = ["/bin/sh", "-c", _START_BROKER_WATCHED, "broker"]
        watched += [str(self._folder) if self._temporary else ""]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                watched + self._java("kafka.Kafka", str(settings)),
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal or the kernel isn't for the broker
            )

    def _format(self, settings: Path) -> None:
        """Prepare an empty data folder, as Kafka asks for before the first start."""
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        arguments = ["format", "--standalone", "--cluster-id=" + cluster_id]
        arguments += ["--config", str(settings)]
        if self._passwords:
            administrator = f"name={ADMINISTRATOR},password={self._passwords.administrator}"
            arguments += ["--add-scram", f"{secured.MECHANISM}=[{administrator}]"]
        # In a file, one to a line, for others can see the command line.
        file = self._folder / "format.arguments"
        file.touch(mode=0o600)
        file.write_text("\n".join(arguments))
        run = subprocess.run(
            self._java("kafka.tools.StorageTool", f"@{file}"),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS,
        )
        if run.returncode != 0:
            output = _tail(run.stdout + run.stderr)
            raise BrokerError(f"{self._folder} can't be formatted:\n{output}")

    def _settings_of(self, user: str, password: str) -> dict[str, str]:
        certificate = self._folder / "certificate.pem"
        return secured.client_settings(self.bootstrap_servers, certificate, user, password)

    def _properties(self, controller_port: int) -> str:
        """Return the broker's settings file."""
        listener = secured.PROTOCOL if self._passwords else "PLAINTEXT"
        settings = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "listeners": f"{listener}://{self.bootstrap_servers},"
            f"CONTROLLER://{LOOPBACK}:{controller_port}",
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.bootstrap.servers": f"{LOOPBACK}:{controller_port}",
            "log.dirs": self._folder / "data",
            "num.partitions": 4,
            # After a SIGKILL the controller lets the same broker in again when this has passed.
            "broker.session.timeout.ms": 3_000,
            "broker.heartbeat.interval.ms": 500,
            # One broker keeps the only copy of everything, its own topics included.
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 1,
            # Who may do what can be restricted, as on a site's brokers; until then all may do all.
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
            # A group of one laptop needs no time for other members to arrive.
            "group.initial.rebalance.delay.ms": 0,
        }
        if self._passwords:
            passwords = self._passwords
            settings |= secured.broker_settings(
                self._folder, passwords.store, ADMINISTRATOR, passwords.administrator,
                passwords.broker,
            )  # fmt: skip
        return "".join(f"{key}={value}\n" for key, value in settings.items())

    def _java(self, main_class: str, *arguments: str) -> list[str]:
        """Return the command that runs one of Kafka's own programs."""
        jars = [*fetch_jars(*KAFKA_JARS), *spark_home().glob("jars/scala-library-*.jar")]
        logging_option = f"-Dlog4j2.configurationFile={self._folder / 'log4j2.properties'}"
        class_path = os.pathsep.join(map(str, jars))
        temporary = f"-Djava.io.tmpdir={self._folder}"
        java = [java_command(), *_JVM_OPTIONS, temporary, logging_option, "-cp", class_path]
        return [*java, main_class, *arguments]

    def _wait_until_it_answers(self) -> None:
        """Ask the broker for its topics until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BrokerError(f"the broker ended; its last log lines:\n{self._log_tail()}")
            with contextlib.suppress(KafkaError, OSError):
                self.topics()
                return
            time.sleep(0.1)
        raise BrokerError(
            f"the broker doesn't answer after {START_SECONDS} s; its last log lines:\n"
            f"{self._log_tail()}"
        )

    def _end(self, signal_number: signal.Signals) -> None:
        """Send a signal to the process, wait for its end, and dismiss its watcher."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"ended in order\n")
            process.stdin.close()
        process.send_signal(signal_number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)

    def _log_tail(self) -> str:
        return _tail(self.log_file.read_text(errors="replace") if self.log_file.exists() else "")

    def _remove_folder(self) -> None:
        if self._temporary:
            self._temporary.cleanup()


def count_records(bootstrap_servers: str, topic: str) -> dict[int, int]:
    """Return how many records each partition of a topic holds; nothing if there is no such topic.

    Parameters
    ----------
    bootstrap_servers : str
        Addresses of brokers, ``host:port`` separated by commas.
    topic : str
        The topic's name.

    Returns
    -------
    dict of int to int
        Offsets in each partition, by its number.

    Raises
    ------
    BrokerError
        If no broker answers within 10 s.
    ValueError
        If the address has no port.

    Examples
    --------
    >>> with LocalKafka() as kafka:
    ...     kafka.create_topic("events", partitions=2)
    ...     count_records(kafka.bootstrap_servers, "events")
    {0: 0, 1: 0}
    """
    check_address(bootstrap_servers)
    milliseconds = ANSWER_SECONDS * 1000
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=bootstrap_servers.split(","), bootstrap_timeout_ms=milliseconds
        )
        with contextlib.closing(consumer):
            numbers = consumer.partitions_for_topic(topic) or ()
            partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
            firsts, ends = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    except KafkaError as error:
        raise BrokerError(
            f"no Kafka broker answers at {bootstrap_servers} within {ANSWER_SECONDS} s: check the "
            "address, and that the broker runs."
        ) from error
    return {part.partition: ends[part] - firsts[part] for part in partitions}


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on.

    Raises
    ------
    OSError
        If no port can be opened there.

    Examples
    --------
    >>> 1 <= free_port() <= 65535
    True
    """
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def port_is_free(port: int) -> bool:
    """Tell whether a broker can open a port of the loopback interface.

    Examples
    --------
    >>> port_is_free(free_port())
    True
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except (OSError, OverflowError):  # there is no port above 65535
            return False
    return True


def fetch() -> None:
    """Fetch the broker's jars, so that the first start needs no network."""
    fetch_jars(*KAFKA_JARS)


def _admin(settings: Mapping[str, str]) -> KafkaAdminClient:
    """Return a client for questions and orders to the broker; it gives up after 5 s."""
    return KafkaAdminClient(
        **secured.python_settings(settings), request_timeout_ms=5_000, bootstrap_timeout_ms=2_000
    )


def _has_leaders(admin: KafkaAdminClient, topic: str) -> bool:
    """Tell whether every partition of a topic can be written to."""
    (description,) = admin.describe_topics([topic])
    partitions = description["partitions"]
    return bool(partitions) and all(partition["leader_id"] >= 0 for partition in partitions)


def _poll(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Return when `condition()` is true; raise `BrokerError` if that takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(KafkaError):
            if condition():
                return
        time.sleep(0.05)
    raise BrokerError(f"{otherwise} after {seconds} s.")


def _tail(log: str, lines: int = 15) -> str:
    return "\n".join(log.strip().splitlines()[-lines:])
