"""A stream in a live kernel: interrupted, run again, and ended with the kernel."""

import os
import signal
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from processes import ROOT, is_alive, wait_until

from conftest import over_sockets

SETUP = """
from helpers.spark import get_spark
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream
import os
counts = []
spark = get_spark(cores=1)

def run(until):
    global stream
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, ["{topic}"], {{
        "bootstrap.servers": "{servers}", "auto.offset.reset": "earliest"}})
    stream.foreachBatch(lambda df, batch_id: counts.append(df.count()))
    run_stream(ssc, until=until, timeout=300)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A new kernel, started as JupyterLab does."""
    manager = KernelManager(**over_sockets(tmp_path_factory.mktemp("kernel")))
    manager.start_kernel(cwd=str(ROOT / "notebooks"))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, source, seconds=600):
    """Run a cell to its end, and return its reply and output."""
    printed = []

    def keep(message):
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(source, timeout=seconds, output_hook=keep)
    return reply["content"], "".join(printed)


def test_interrupt_and_run_again(kernel, kafka, topic, produce, tmp_path):
    """An interrupt ends the stream, and the same kernel can run it again."""
    manager, client = kernel
    produce(topic, [b"1", b"2", b"3"])
    reply, _ = execute(client, SETUP.format(topic=topic, servers=kafka.bootstrap_servers))
    assert reply["status"] == "ok", reply

    marker = tmp_path / "marker"
    source = f"run(lambda: sum(counts) == 3 and open({str(marker)!r}, 'w') and False)"
    # By default a kernel refuses the cells that reach it just after one that failed.
    client.execute(source, stop_on_error=False)
    wait_until(marker.exists)
    manager.interrupt_kernel()
    assert shell_error(client) == "KeyboardInterrupt"

    reply, printed = execute(
        client, "counts.clear()\nrun(lambda: stream.lag() == 0)\nprint('again', sum(counts))"
    )
    assert reply["status"] == "ok", reply
    assert "again 3" in printed


def shell_error(client):
    """Wait for the last cell to end, and return the name of its error."""
    reply = client.get_shell_msg(timeout=300)
    return reply["content"].get("ename")


def test_spark_ends_with_the_kernel(kernel, kafka, topic):
    """If the kernel is killed, Java ends and Spark's files are removed."""
    _, client = kernel
    execute(client, SETUP.format(topic=topic, servers=kafka.bootstrap_servers))
    look = "from helpers.spark import log_file\n"
    look += "print(os.getpid(), spark.sparkContext._gateway.proc.pid, log_file().parent)"
    kernel_process, java_process, folder = execute(client, look)[1].split()
    assert Path(folder).is_dir()
    os.kill(int(kernel_process), signal.SIGKILL)
    wait_until(lambda: not is_alive(int(java_process)))
    wait_until(lambda: not Path(folder).exists())
