"""The streaming job, as a program that also logs its memory use.

python long_stream.py FILE OPTIONS...    (the options are those of examples/streaming_job.py)
"""

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import psutil
from pyspark import SparkContext

SECONDS = 10  # between two samples

ROOT = Path(__file__).resolve().parent.parent


def sample(began: float) -> dict:
    """Return the seconds since the start and the megabytes in use, the heap's after a GC.

    Java's are those beside its heap, which grows and shrinks as the collector likes.
    """
    jvm = SparkContext._active_spark_context._jvm
    jvm.java.lang.System.gc()
    heap = jvm.java.lang.management.ManagementFactory.getMemoryMXBean().getHeapMemoryUsage()
    driver = psutil.Process()
    parts = {"driver": driver.memory_info().rss, "java": -heap.getCommitted(), "workers": 0}
    for process in driver.children(recursive=True):
        try:
            name = "java" if process.name() == "java" else "workers"
            parts[name] += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    megabytes = {name: size // 2**20 for name, size in {"heap": heap.getUsed(), **parts}.items()}
    return {"seconds": round(time.monotonic() - began), **megabytes}


def watch(file: Path, ended: threading.Event) -> None:
    """Append a sample to a file every ten seconds."""
    began = time.monotonic()
    while not ended.wait(SECONDS):
        if SparkContext._active_spark_context is not None:
            with file.open("a") as lines:
                lines.write(f"{json.dumps(sample(began))}\n")


def main(file: str, arguments: list[str]) -> int:
    """Run the job while its memory is sampled."""
    spec = importlib.util.spec_from_file_location("job", ROOT / "examples" / "streaming_job.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    ended = threading.Event()
    threading.Thread(target=watch, args=[Path(file), ended], daemon=True).start()
    try:
        return job.main(arguments)
    finally:
        ended.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
