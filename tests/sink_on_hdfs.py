"""A sink on a real HDFS, as a program because Java needs Hadoop's jars at start; prints JSON.

python sink_on_hdfs.py FOLDER
"""

import json
import sys

from hadoop import HADOOP
from test_sinks import Sink, stored, write

from helpers.sinks import SinkError
from helpers.sinks.commits import CommitLog
from helpers.spark import fetch_jars, full_path, get_spark

SPARK_HAS = ("hadoop-client-api", "hadoop-client-runtime")


def main(folder: str) -> None:
    """Store two overlapping batches, and try a second sink and a second manifest."""
    jars = [str(jar) for jar in fetch_jars(*HADOOP) if not any(n in jar.name for n in SPARK_HAS)]
    config = {"spark.driver.extraClassPath": ":".join(jars), "spark.ui.enabled": "false"}
    spark = get_spark(cores=1, memory="1g", config=config)
    hadoop = spark._jvm.org.apache.hadoop
    configuration = hadoop.conf.Configuration()
    configuration.set("hdfs.minidfs.basedir", folder)
    cluster = getattr(hadoop.hdfs, "MiniDFSCluster$Builder")(configuration).build()
    try:
        cluster.waitActive()
        uri = cluster.getFileSystem().getUri().toString()
        spark._jsc.hadoopConfiguration().set("fs.defaultFS", uri)  # as a cluster's settings do
        found = try_sink(spark, f"{uri}/scored")
        found["checkpoint"] = checkpointed(spark, full_path(spark, "hdfs:///checkpoint"))
        print(json.dumps(found))
    finally:
        cluster.shutdown()
        spark.stop()


def checkpointed(spark, checkpoint):
    """Run a stream with this checkpoint, and return the checkpoint's path."""
    rate = spark.readStream.format("rate").load()
    query = rate.writeStream.format("noop").trigger(availableNow=True)
    query.option("checkpointLocation", checkpoint).start().awaitTermination(600)
    return checkpoint


def try_sink(spark, path):
    """Return the path, the refusals' messages and the stored offsets."""
    found = {"path": path}
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 5, 15)
        try:
            with Sink(spark, path):
                pass
        except SinkError as error:
            found["second sink"] = str(error)
    log = CommitLog(spark, path)
    try:
        log.write(log.last())
    except SinkError as error:
        found["second manifest"] = str(error)
    return {**found, "offsets": stored(spark, path)}


if __name__ == "__main__":
    main(*sys.argv[1:])
