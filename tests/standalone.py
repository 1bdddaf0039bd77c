"""Spark's standalone cluster on loopback: a master and workers, each in a process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from processes import running, wait_until

from helpers.spark import spark_home

_DEPLOY = "org.apache.spark.deploy"


@contextlib.contextmanager
def standalone(folder: Path, workers: int = 1, wrapper: Sequence[str] = ()) -> Iterator[str]:
    """Start a cluster, and stop it at exit.

    Parameters
    ----------
    folder : pathlib.Path
        An existing folder for the workers' files and the logs.
    workers : int
        How many workers to start, with one core and 2 GB each.
    wrapper : sequence of str
        A command that starts each worker, whose command follows.

    Yields
    ------
    str
        The master's address.
    """
    # Executors inherit the workers' environment, and must not find this repository through it.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_HOME": str(spark_home())}
    spark = [str(spark_home() / "bin" / "spark-class")]
    web = ("--webui-port", "0")
    with contextlib.ExitStack() as processes:

        def start(name: str, command: list[str], pattern: str) -> str:
            """Start a process, wait until its log has a pattern, and return what matched."""
            log = folder / f"{name}.log"
            output = processes.enter_context(log.open("w"))
            options = {"env": own, "cwd": folder, "stderr": output}
            processes.enter_context(running(command, **options))
            return wait_until(lambda: re.search(pattern, log.read_text(errors="replace"))).group()

        master = [*spark, f"{_DEPLOY}.master.Master", "--host", "127.0.0.1", "--port", "0", *web]
        address = start("master", master, r"spark://127\.0\.0\.1:\d+")
        for number in range(workers):
            worker = [*wrapper, *spark, f"{_DEPLOY}.worker.Worker", "--host", "127.0.0.1"]
            worker += ["--cores", "1", "--memory", "2g", *web]
            worker += ["--work-dir", str(folder / f"work-{number}"), address]
            start(f"worker-{number}", worker, "Successfully registered with master")
        yield address
