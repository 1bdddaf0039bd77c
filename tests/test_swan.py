"""CERN SWAN: its kernel extensions make the session, and the kit works with it."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from notebook_cells import cells_of
from processes import ROOT, running

from conftest import over_sockets
from helpers.broker import free_port
from helpers.spark import session, spark_home

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PACKAGES = Path(sys.prefix) / "swan"
EXTENSIONS = "--InteractiveShellApp.extensions=['sparkmonitor.kernelextension',"
EXTENSIONS += "'sparkconnector.connector']"
FEW = "events, sample_events = 2_000, 500"

# SWAN's allocator of ports, which Jupyter's server runs there. Here it keeps to loopback.
ALLOCATOR = """
import logging, zmq
from swanportallocator import portallocator

bind = zmq.Socket.bind
zmq.Socket.bind = lambda socket, address: bind(socket, address.replace("*", "127.0.0.1"))
portallocator.gethostname = lambda: "localhost"
allocator = portallocator.PortAllocator(logging.getLogger())
print("ready", flush=True)
allocator.run()
"""


class SwanKernel:
    """A kernel with some variables of SWAN, and the part of its page that talks to extensions."""

    def __init__(self, client):
        self._client = client

    def execute(self, source):
        """Run a cell; return its value as text, and its error."""
        values, replies = [], []
        message = self._client.execute(source)
        while not replies or replies[-1] != "idle":
            answer = self._client.get_iopub_msg(timeout=300)
            if answer["parent_header"].get("msg_id") == message:
                if answer["msg_type"] == "execute_result":
                    values.append(answer["content"]["data"]["text/plain"])
                if answer["msg_type"] == "error":
                    values.append(f"{answer['content']['ename']}: {answer['content']['evalue']}")
                if answer["msg_type"] == "status":
                    replies.append(answer["content"]["execution_state"])
        return values[-1] if values else None

    def open(self, target):
        """Open a channel to an extension, as SWAN's page does."""
        content = {"comm_id": target, "target_name": target, "data": {}}
        self._send("comm_open", content)

    def send(self, target, data):
        """Send a message to an extension."""
        self._send("comm_msg", {"comm_id": target, "data": data})

    def answer(self, *kinds):
        """Wait for a message of an extension of one of some types."""
        while True:
            message = self._client.get_iopub_msg(timeout=120)
            data = message["content"].get("data", {})
            if message["msg_type"] == "comm_msg" and data.get("msgtype") in kinds:
                return data

    def _send(self, kind, content):
        self._client.shell_channel.send(self._client.session.msg(kind, content))


@contextmanager
def swan_kernel(*arguments, **variables):
    """Start a kernel in the folder of the notebooks, with arguments and environment variables."""
    sockets = TemporaryDirectory(prefix="kernel-")
    manager = KernelManager(**over_sockets(sockets.name))
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    folder, extra = str(ROOT / "notebooks"), list(arguments)
    manager.start_kernel(cwd=folder, env=environment, extra_arguments=extra)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield SwanKernel(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()  # which lets Java remove its files
        sockets.cleanup()


def test_without_a_connection_to_swans_cluster_the_notebook_says_so():
    """A notebook that isn't connected starts no session, and the message says how to connect."""
    with swan_kernel(SPARK_CLUSTER_NAME="analytix") as kernel:
        error = kernel.execute("from helpers.spark import get_spark\nget_spark()")
    assert error.startswith("SessionError: this notebook isn't connected to SWAN's Spark cluster")
    assert "'Apache Spark' and connect, then run this cell again" in error


# Settings of a session that SWAN makes itself, or that belong to one machine or cluster.
SWANS = {
    "spark.app.name", "spark.master", "spark.jars", "spark.ui.showConsoleProgress",
    "spark.python.daemon.module", "spark.executor.instances", "spark.executor.cores",
    "spark.executor.memory",
}  # fmt: skip


def swan_options(path):
    """Return the options that SWAN finds in a notebook, as its page sends them."""
    saved = nbformat.read(path, as_version=4).metadata.sparkconnect
    assert saved.bundled_options == []
    return {option.name: option.value for option in saved.list_of_options}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_carry_the_kits_settings_to_swan(path):
    """SWAN's session gets the settings of `get_spark`, and the connector as a package."""
    settings = session._settings("name", "yarn", 2, 1, "2g", {})
    options = swan_options(path)
    package = session.CONNECTOR.format(scala="2.13", spark="4.2.0")
    assert options.pop("spark.jars.packages") == package
    assert options == {name: value for name, value in settings.items() if name not in SWANS}


def test_the_packages_for_swan_are_those_of_the_kit():
    """SWAN has Spark and TensorFlow; the other packages have the versions of requirements.txt."""
    kit = (ROOT / "requirements.txt").read_text().splitlines()
    swan = (ROOT / "requirements-swan.txt").read_text().splitlines()
    lines = [line for line in swan if not line.startswith("#")]
    assert lines and set(lines) <= set(kit)
    assert not [line for line in lines if line.startswith(("pyspark", "tensorflow", "keras"))]


@pytest.fixture(scope="module")
def ports():
    """The ports that SWAN has for sessions, in the order in which it gives them away."""
    return [str(free_port()) for _ in range(6)]


@pytest.fixture(scope="module")
def connected(ports, tmp_path_factory):
    """A kernel that was connected with SWAN's button, and the answer that the button shows."""
    home = tmp_path_factory.mktemp("home")
    swan = {**os.environ, "PYTHONPATH": str(PACKAGES), "COMPUTING_PORTS": ",".join(ports)}
    with running([sys.executable, "-c", ALLOCATOR], env=swan) as allocator:
        assert allocator.stdout.readline() == "ready\n"
        with swan_kernel(
            EXTENSIONS, PYTHONPATH=PACKAGES, SPARK_HOME=spark_home(), SPARK_CLUSTER_NAME="local",
            SPARK_LOCAL_IP="127.0.0.1", SERVER_HOSTNAME="localhost", PYSPARK_PYTHON=sys.executable,
            HOME=home, TMPDIR=home,
        ) as kernel:  # fmt: skip
            kernel.open("SparkMonitor")
            kernel.open("SparkConnector")
            kernel.answer("sparkconn-action-open")
            options = {"action": "sparkconn-action-connect", "options": swan_options(NOTEBOOKS[0])}
            kernel.send("SparkConnector", options)
            yield kernel, kernel.answer("sparkconn-connected", "sparkconn-connect-error")
    Path("/tmp/port_allocator").unlink()


@pytest.mark.hub
def test_the_walkthrough_runs_on_the_session_that_swans_button_makes(connected, ports):
    """The whole notebook uses SWAN's session, with SWAN's ports and the notebook's options."""
    kernel, answer = connected
    assert answer["msgtype"] == "sparkconn-connected", answer
    kernel.execute("swans = spark")
    for cell in cells_of("1_walkthrough"):
        if cell.cell_type == "code":
            value = kernel.execute(cell.source)
            if "parameters" in cell.metadata.get("tags", []):
                kernel.execute(FEW)
    assert value.startswith("{'events': 2000, 'signal': ")
    assert kernel.execute("spark.sparkContext is swans.sparkContext, sc.appName") == (
        "(True, 'pyspark_shell_swan')"
    )
    names = "['spark.driver.port', 'spark.driver.blockManager.port', 'spark.ui.port']"
    assert kernel.execute(f"[sc.getConf().get(name) for name in {names}]") == str(ports[:3])
    assert kernel.execute("sc.getConf().get('spark.sql.session.timeZone')") == "'UTC'"


@pytest.mark.hub
def test_sparkmonitor_follows_the_jobs(connected):
    """SWAN's monitor shows the jobs of a session that the kit uses."""
    kernel, _ = connected
    kernel.execute("from helpers.spark import get_spark")
    kernel._client.execute("get_spark().range(5).count()")
    assert "sparkJob" in kernel.answer("fromscala")["msg"]


@pytest.mark.hub
def test_a_session_that_swan_stopped_is_not_replaced(connected):
    """After SWAN's button has disconnected the notebook, it has to be connected again."""
    kernel, _ = connected
    kernel.send("SparkConnector", {"action": "sparkconn-action-disconnect"})
    error = kernel.execute("get_spark()")
    assert error.startswith("SessionError: this notebook isn't connected to SWAN's Spark cluster")


@pytest.mark.hub
def test_without_a_cluster_the_session_has_swans_listener():
    """A session that the kit starts on SWAN without a cluster is shown by SWAN's monitor."""
    extension = "--InteractiveShellApp.extensions=['sparkmonitor.kernelextension']"
    with swan_kernel(extension, PYTHONPATH=PACKAGES, SPARK_HOME=spark_home()) as kernel:
        kernel.open("SparkMonitor")
        kernel.answer("commopen")
        kernel.execute("from helpers.spark import get_spark\nspark = get_spark(cores=1)")
        kernel._client.execute("spark.range(5).count()")
        assert "spark" in kernel.answer("fromscala")["msg"]
