"""The process of a local broker, and its folder: start, stop, kill, wait.

`server` defines how the broker is set up, and `admin` administers it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from helpers.broker import security as secured
from helpers.broker import server
from helpers.broker.admin import BrokerAdmin, admin_client, wait_until
from helpers.broker.security import ADMINISTRATOR, LOOPBACK
from helpers.broker.server import KAFKA_VERSION, START_SECONDS, BrokerError
from helpers.kafka_settings import ClientSettings

STOP_SECONDS = 30
LOCK_SECONDS = 5
_PORTS_TRIED = 100
_ATTEMPT_SECONDS = 2  # to reach a broker that starts; then its process is looked at again

# The shell becomes the broker (`exec` keeps the process id, $$) and leaves a watcher that reads
# from a pipe held by this Python process. A line in the pipe dismisses the watcher. End of file
# means that this process has ended, for whatever reason: the watcher then kills the broker and
# removes its temporary folder ($1, empty if the folder is to stay). A service manager sends signals
# to all processes of a service, also to the watcher.
_START_BROKER_WATCHED = """
temporary_folder=$1; shift
exec 3<&0
(
    trap '' TERM INT HUP
    read -r line <&3 && exit 0
    kill -9 $$
    test -z "$temporary_folder" && exit 0
    for attempt in 1 2 3 4 5; do rm -rf "$temporary_folder" && exit 0; sleep 1; done
) > /dev/null 2>&1 &
exec "$@" < /dev/null 3<&-
"""


class LocalKafka(BrokerAdmin):
    """An Apache Kafka broker in one process (KRaft, no ZooKeeper), on loopback only.

    Parameters
    ----------
    port : int, optional
        The port for clients. The default is a free port.
    folder : str or pathlib.Path, optional
        The data folder; with the folder of an earlier broker, its data is available again. The
        default is a temporary folder that is removed at the end.
    security : str, optional
        ``"SASL_SSL"`` for a secured broker: TLS with a new certificate, SCRAM-SHA-512
        authentication, and only the permissions that ACLs grant. It must use a temporary folder.

    Attributes
    ----------
    bootstrap_servers : str
        The broker's address for clients, as ``host:port``.
    log_file : pathlib.Path
        The broker's log since its last start.

    Raises
    ------
    BrokerError
        If the port is in use, the folder can't be used, for example because the disk is full, or is
        that of another running broker, or the broker doesn't answer within 120 s of its start; the
        message then ends with the broker's last log lines.
    ValueError
        If the port is not between 1 and 65535, the folder's name is empty or has a comma or a line
        break, `security` is neither ``"SASL_SSL"`` nor None, or a secured broker is given a folder.
    helpers.spark.JarsError
        If Java is missing or the broker's jars can't be fetched.

    Notes
    -----
    The broker ends when the Python process ends, even if Python is killed.

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
            raise ValueError(f"port {port} is out of range: use one between 1024 and 65535.")
        if security not in (None, secured.PROTOCOL):
            raise ValueError(f"security is {security!r}: it must be 'SASL_SSL', or None.")
        if security and folder is not None:
            raise ValueError("a secured broker keeps passwords in memory only: leave out folder=.")
        self._passwords = secured.Passwords() if security else None
        self._temporary = _temporary_folder() if folder is None else None
        if folder is not None:
            _check_name(str(folder))
        self._folder = Path(self._temporary.name if folder is None else folder).absolute()
        self._lock: IO[bytes] | None = None  # keeps other brokers out of the folder
        self._port = port if port is not None else free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_run = False
        self._class_option: str | None = None  # of Java, while `archive` writes the class archive
        self.bootstrap_servers = f"{LOOPBACK}:{self._port}"
        self.log_file = self._folder / "broker.log"

    def __repr__(self) -> str:
        state = "running" if self._process else "stopped"
        secure = " SASL_SSL" if self._passwords else ""
        return f"<LocalKafka {KAFKA_VERSION} {self.bootstrap_servers}{secure} {state}>"

    @property
    def settings(self) -> ClientSettings:
        """Client settings, by Kafka's names; for a secured broker, the administrator's.

        Examples
        --------
        >>> with LocalKafka() as kafka:
        ...     list(kafka.settings)
        ['bootstrap.servers']
        """
        settings = ClientSettings({"bootstrap.servers": self.bootstrap_servers})
        if self._passwords is None:
            return settings
        return settings | {
            "security.protocol": secured.PROTOCOL,
            "sasl.mechanism": secured.MECHANISM,
            "sasl.jaas.config": secured.jaas(ADMINISTRATOR, self._passwords.administrator),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self._folder / "certificate.pem"),
        }

    @property
    def pid(self) -> int | None:
        """The id of the broker's process; None if it is stopped.

        Examples
        --------
        >>> LocalKafka().pid is None
        True
        """
        return self._process.pid if self._process else None

    def __enter__(self) -> LocalKafka:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._remove_folder()

    def start(self) -> LocalKafka:
        """Start the broker with its existing data, and return once it answers.

        Returns
        -------
        LocalKafka
            This broker. If it is already running, nothing happens.

        Raises
        ------
        BrokerError
            If the port is in use, or the broker doesn't answer within 120 s.
        """
        if self._process is not None:
            return self
        try:
            self._check_port()
            self._launch()
            if not wait_until(self._answers, START_SECONDS):
                raise BrokerError(
                    f"the broker doesn't answer after {START_SECONDS} s; {self._last_log_lines()}"
                )
        except BaseException:
            self.kill()
            if not self._has_run:  # otherwise keep the data for another attempt
                self._remove_folder()
            raise
        self._has_run = True
        return self

    def stop(self) -> None:
        """Stop the broker cleanly, with everything on disk; its data stays for `start`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the broker (SIGKILL), as a crash would; its data stays for `start`."""
        self._end(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until the broker exits on its own, and return its exit code.

        Raises
        ------
        BrokerError
            If it exits with an error; the message ends with the last log lines.
        """
        code = self._process.wait()
        if code != 0:
            raise BrokerError(f"the broker ended ({code}); {self._last_log_lines()}")
        return code

    def _check_port(self) -> None:
        """Raise `BrokerError` if the port is in use; the broker would report it seconds later."""
        if not port_is_free(self._port):
            raise BrokerError(
                f"port {self._port} is in use: stop the program there, or choose another port."
            )

    def _launch(self) -> None:
        """Prepare the folder, and start the process and its watcher."""
        try:
            self._lock_folder()
            command = server.prepare(
                self._folder, self._port, free_port(besides=self._port), self._passwords,
                self._class_option,
            )  # fmt: skip
            self._run(command)
        except OSError as error:
            raise BrokerError(
                f"the broker can't be set up in {self._folder} ({error}): free space on the disk, "
                "or choose another folder, or another TMPDIR."
            ) from None
        except subprocess.TimeoutExpired as error:
            raise BrokerError(
                f"{Path(error.cmd[0]).name} did not prepare the broker within {error.timeout} s: "
                "try again when this machine is less busy."
            ) from None

    def _run(self, command: list[str]) -> None:
        """Start the process and its watcher."""
        watched = ["/bin/sh", "-c", _START_BROKER_WATCHED, "broker"]
        watched += [str(self._folder) if self._temporary else ""]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                watched + command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C in the terminal or kernel doesn't reach it
                pass_fds=[self._lock.fileno()], env=os.environ | server.LOCALE,
            )  # fmt: skip

    def _lock_folder(self) -> None:
        """Take the folder for this broker, until its process has ended."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "lock").open("wb")
        # The watcher of a broker that has just ended may need a moment to end as well.
        if not wait_until(self._has_locked, LOCK_SECONDS):
            raise BrokerError(
                f"another broker is running with the folder {self._folder}: stop it, or choose "
                "another folder."
            )

    def _has_locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise BrokerError(
                f"the folder {self._folder} can't be locked ({error.strerror}): choose one on a "
                "local disk."
            ) from None
        return True

    def _answers(self) -> bool:
        """Request the list of topics; raise `BrokerError` if the broker has ended."""
        if self._process.poll() is not None:
            raise BrokerError(f"the broker ended; {self._last_log_lines()}")
        with admin_client(self.settings, connect_seconds=_ATTEMPT_SECONDS) as admin:
            admin.list_topics()
        return True

    def _end(self, signal_number: signal.Signals) -> None:
        """Send the process a signal, dismiss the watcher, and wait until the process has ended."""
        process, self._process = self._process, None
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()  # the process has it as well
        if process is None:
            return
        try:
            process.send_signal(signal_number)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"ended in order\n")
                process.stdin.close()
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
        except BaseException:  # a second Ctrl-C: nothing else would end the process
            process.kill()
            raise

    def _last_log_lines(self) -> str:
        lines = server.last_lines(self.log_file.read_text(errors="replace"))
        return f"its last log lines:\n{lines}"

    def _remove_folder(self) -> None:
        if self._temporary:
            self._temporary.cleanup()


def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Return a new temporary folder."""
    try:
        _check_name(tempfile.gettempdir())
        return tempfile.TemporaryDirectory(prefix="kafka-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BrokerError(
            f"there is no folder for temporary files ({error}): free space on the disk, or choose "
            "another TMPDIR."
        ) from None


def _check_name(folder: str) -> None:
    """Raise `ValueError` if Kafka would misread a folder's name."""
    if re.search(r"^$|[,\r\n]", folder):
        raise ValueError(
            f"the folder {folder!r} is empty or has a comma or a line break, which Kafka does not "
            "allow: choose another folder, or another TMPDIR."
        )


def free_port(besides: int | None = None) -> int:
    """Return a free loopback port outside the range that the system uses for connections.

    By default, Linux uses the ports from 32,768 on, macOS those from 49,152 on.

    Parameters
    ----------
    besides : int, optional
        A port that is chosen already.

    Raises
    ------
    OSError
        If no port can be opened.

    Examples
    --------
    >>> 15_000 <= free_port() < 32_000
    True
    """
    for _ in range(_PORTS_TRIED):
        port = 15_000 + secrets.randbelow(17_000)
        if port != besides and port_is_free(port):
            return port
    raise OSError(f"none of {_PORTS_TRIED} ports of {LOOPBACK} can be opened")


def port_is_free(port: int) -> bool:
    """Return whether a broker can open a port of the loopback interface.

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
