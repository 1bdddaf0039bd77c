"""A sink on a real HDFS, as a program, for Java needs Hadoop's jars from its start; prints JSON.

python sink_on_hdfs.py FOLDER
"""

import json
import sys

from test_sinks import Sink, stored, write

from helpers.files import full_path
from helpers.jars import fetch_jars
from helpers.session import get_spark
from helpers.sinks import SinkError
from helpers.sinks.commits import CommitLog

# Hadoop in one Java process, for tests, and what it needs.
HADOOP = (
    "org.apache.hadoop:hadoop-client-minicluster:3.5.0",
    "org.junit.jupiter:junit-jupiter-api:5.11.4",
    "org.mockito:mockito-core:4.11.0",
    "org.bouncycastle:bcpkix-jdk18on:1.79",
)
SPARK_HAS = ("hadoop-client-api", "hadoop-client-runtime")


def main(folder: str) -> None:
    """Store two batches that overlap, and have a second sink and a second manifest be refused."""
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
        spark._jsc.hadoopConfiguration().set("fs.defaultFS", uri)  # as a cluster's own settings do
        found = try_sink(spark, f"{uri}/scored")
        found["checkpoint"] = checkpointed(spark, full_path(spark, "hdfs:///checkpoint"))
        print(json.dumps(found))
    finally:
        cluster.shutdown()
        spark.stop()


def checkpointed(spark, checkpoint):
    """Run a stream with a checkpoint there, and return the checkpoint's path."""
    rate = spark.readStream.format("rate").load()
    query = rate.writeStream.format("noop").trigger(availableNow=True)
    query.option("checkpointLocation", checkpoint).start().awaitTermination(600)
    return checkpoint


def try_sink(spark, path):
    """Return what became of everything."""
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
