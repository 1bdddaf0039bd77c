"""A broker with settings that `LocalKafka` doesn't have, for the duration of a `with` block."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from processes import end, wait_until

from helpers.broker import free_port, port_is_free
from helpers.broker.server import prepare


@contextlib.contextmanager
def small_broker(
    folder: Path, protocol: str, settings: Mapping[str, object], *java_options: str
) -> Iterator[str]:
    """Run a broker on loopback, and yield its address.

    Parameters
    ----------
    folder : pathlib.Path
        The folder for its settings, log and data.
    protocol : str
        The security protocol of its only listener for clients.
    settings : mapping
        Further settings of the broker; they override those of `LocalKafka`.
    *java_options : str
        Options for Java.
    """
    port = free_port()
    controller_port = free_port(besides=port)
    java, *arguments = prepare(folder, port, controller_port, None)
    listeners = {
        "listeners": f"{protocol}://localhost:{port},CONTROLLER://localhost:{controller_port}",
        "listener.security.protocol.map": f"{protocol}:{protocol},CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": protocol,
    }
    with Path(arguments[-1]).open("a") as file:  # for Java, the last of several values is the one
        file.writelines(f"{name}={value}\n" for name, value in {**listeners, **settings}.items())
    log_file = folder / "broker.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [java, *java_options, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: not port_is_free(port) or process.poll() is not None)
        assert process.poll() is None, log_file.read_text()[-3_000:]
        yield f"localhost:{port}"
    finally:
        end(process)
