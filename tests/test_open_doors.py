"""The kit listens on the loopback interface only.

The same is tested of a notebook in test_readme.py, and of a service in test_streaming_job.py.
"""

import os
import socket
import struct
import sys

import pytest
from processes import ROOT, beyond_loopback, dry_run_make, run_python, wait_until, watched
from pyspark.java_gateway import ensure_callback_server_started

from helpers.broker import free_port
from helpers.spark import callbacks, spark_home

JOB = str(ROOT / "examples" / "streaming_job.py")
SECONDS = 300


@pytest.fixture
def job(kafka, topic, produce, event_values, tmp_path):
    """Return the arguments of a job on a topic with events."""
    produce(topic, [*event_values, b"rubbish"])
    return [
        JOB, "--engine", "dstream", "--bootstrap-servers", kafka.bootstrap_servers, "--topic",
        topic, "--output", str(tmp_path / "scored"), "--available-now",
    ]  # fmt: skip


def test_the_addresses_that_others_can_reach_are_told_from_loopback():
    """Wildcard, network and link-local addresses are found, and loopback ones are not."""
    addresses = ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "10.0.0.1", "fe80::1%lo"]
    found = beyond_loopback({("x", address, 1) for address in addresses})
    assert [ip for _, ip, _ in found] == ["0.0.0.0", "10.0.0.1", "::", "fe80::1%lo"]


@pytest.mark.long
def test_a_job_under_spark_submit_listens_on_loopback_only(job):
    """A driver that spark-submit starts before any kit code listens on loopback only."""
    command = [str(spark_home() / "bin" / "spark-submit"), "--master", "local[2]", *job]
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_HOME": str(spark_home())}
    environment.pop("SPARK_LOCAL_IP", None)
    with watched(command, env=environment) as (process, seen):
        printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, printed
    assert len(seen) >= 3 and beyond_loopback(seen) == []


def test_the_lab_listens_on_loopback_only():
    """`make lab` keeps Jupyter's default, which is loopback only."""
    (line,) = [line for line in dry_run_make("lab").splitlines() if "jupyter lab" in line]
    port = free_port()
    options = ["--no-browser", f"--port={port}", "--ServerApp.token=x"]
    with watched([*line.split(), *options]) as (_, seen):
        wait_until(lambda: port in {found for _, _, found in list(seen)})
    assert beyond_loopback(seen) == []


def test_other_users_get_nothing_from_sparks_ports(spark):
    """Spark's driver answers only those who know the session's secret."""
    port = int(spark.sparkContext.getConf().get("spark.driver.port"))
    body = b"\x00" * 16
    message = struct.pack(">qbqi", 8 + 1 + 8 + 4 + len(body), 3, 7, len(body)) + body  # a request
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(message)
        answer = connection.recv(4_096)
    assert b"Expected SaslMessage" in answer


def test_sparks_page_ends_no_job(spark):
    """It asks for no password, and any web site can make a browser open an address."""
    assert spark.sparkContext.getConf().get("spark.ui.killEnabled") == "false"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, the users can't be told apart")
@pytest.mark.parametrize("is_ours", [True, False])
def test_other_users_cannot_call_into_python(spark, monkeypatch, is_ours):
    """Java calls Python's functions through a port, where nothing of other users is read."""
    gateway = spark.sparkContext._gateway
    ensure_callback_server_started(gateway)
    if not is_ours:
        monkeypatch.setattr(callbacks, "_USER", callbacks._USER + 1)
    port = gateway._callback_server.server_socket.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"x\nno-object\n")  # a command that the server doesn't know
        assert connection.recv(4_096)[:2] == (b"!x" if is_ours else b"")


def test_a_connection_that_is_reset_does_not_keep_java_out(spark):
    """Port scanners do that; the server for Java's calls must outlast them."""
    gateway = spark.sparkContext._gateway
    ensure_callback_server_started(gateway)
    address = gateway._callback_server.server_socket.getsockname()[:2]
    for _ in range(50):
        with socket.create_connection(address, timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(b"x\nno-object\n")
        assert connection.recv(4_096)[:2] == b"!x"


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root is two users")
def test_another_user_at_the_same_port_is_told_apart():
    """Whoever takes Java's port at another address of loopback is not Java."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as java, server.accept()[0] as from_java:
            assert callbacks._is_ours(from_java)
            port = java.getsockname()[1]
            other = os.fork()
            if other == 0:
                try:
                    os.setuid(65_534)
                    place = {"source_address": ("127.0.0.2", port)}
                    with socket.create_connection(address, **place) as end:
                        end.recv(1)
                finally:
                    os._exit(0)
            server.settimeout(300)
            with server.accept()[0] as from_other:
                is_ours = callbacks._is_ours(from_other)
            os.waitpid(other, 0)
            assert not is_ours


@pytest.mark.parametrize(
    "address", ["0.0.0.0", pytest.param("10.1.2.3", marks=pytest.mark.long)]
)
def test_sparks_page_is_off_where_a_site_would_open_it(address, tmp_path):
    """A site's spark-env.sh may set another address for Spark's page; then there is none."""
    (tmp_path / "spark-env.sh").write_text(f"export SPARK_LOCAL_IP={address}\n")
    program = "from helpers.spark import get_spark; print(get_spark().sparkContext.uiWebUrl)"
    run = run_python("-c", program, env={**os.environ, "SPARK_CONF_DIR": str(tmp_path)})
    assert run.stdout.splitlines()[-1] == "None", run.stderr


def test_a_broker_listens_on_loopback_only():
    """The broker listens on loopback only, for clients and for its controller."""
    command = [sys.executable, "-m", "helpers.broker", "--port", str(free_port())]
    with watched(command) as (process, seen):
        assert "ready at" in process.stdout.readline()
        wait_until(lambda: len(seen) >= 2)
    assert beyond_loopback(seen) == []
