"""A real HDFS and YARN in one Java process, on loopback, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from py4j.java_gateway import GatewayParameters, JavaGateway, JavaObject, launch_gateway
from py4j.protocol import Py4JError

from helpers.spark import fetch_jars, java_command, spark_home

# Hadoop's servers for tests, and what they need.
HADOOP = (
    "org.apache.hadoop:hadoop-client-minicluster:3.5.0",
    "org.junit.jupiter:junit-jupiter-api:5.11.4",
    "org.mockito:mockito-core:4.11.0",
    "org.bouncycastle:bcpkix-jdk18on:1.79",
)
NODES = 2
STOP_SECONDS = 60

# Clients don't get the servers' other settings, which have the servers' folders and ports.
_CLIENTS_NEED = r"^(fs\.defaultFS|yarn\.resourcemanager\..*)$"


class Hadoop:
    """A running cluster.

    Attributes
    ----------
    uri : str
        The root of HDFS.
    environment : dict of str to str
        The variables of a program that uses the cluster.
    logs : pathlib.Path
        The folder with the containers' logs.
    """

    def __init__(self, gateway: JavaGateway, folder: Path) -> None:
        self._hadoop = gateway.jvm.org.apache.hadoop
        self._folder = folder
        self.logs = folder / "target"
        self._hdfs = self._start_hdfs()
        self._files = self._hdfs.getFileSystem()
        self.uri = self._files.getUri().toString()
        self._yarn = self._start_yarn()
        self.environment = self._environment()

    def upload(self, file: Path, target: str) -> None:
        """Copy a file to HDFS, readable for all: YARN shares only such files among programs."""
        path = self._hadoop.fs.Path
        self._files.copyFromLocalFile(False, True, path(str(file)), path(target))

    def download(self, source: str, folder: Path) -> None:
        """Copy a folder from HDFS."""
        path = self._hadoop.fs.Path
        self._files.copyToLocalFile(path(source), path(str(folder)))

    def applications(self) -> list[str]:
        """Return the ids of all applications, in the order of their start."""
        found = self._yarn.getResourceManager().getRMContext().getRMApps()
        return sorted(each.toString() for each in found.keySet())

    def kill(self, application: str) -> None:
        """Kill an application, as ``yarn application -kill`` does."""
        client = self._hadoop.yarn.client.api.YarnClient.createYarnClient()
        client.init(self._yarn.getConfig())
        client.start()
        try:
            parse = self._hadoop.yarn.api.records.ApplicationId.fromString
            client.killApplication(parse(application))
        finally:
            client.stop()

    def stop(self) -> None:
        """Stop YARN with all containers, then HDFS."""
        self._yarn.stop()
        self._hdfs.shutdown()

    def _start_hdfs(self) -> JavaObject:
        configuration = self._hadoop.conf.Configuration()
        configuration.set("hdfs.minidfs.basedir", str(self._folder / "hdfs"))
        configuration.set("dfs.replication", "1")
        builder = getattr(self._hadoop.hdfs, "MiniDFSCluster$Builder")
        cluster = builder(configuration).build()
        cluster.waitActive()
        return cluster

    def _start_yarn(self) -> JavaObject:
        java_home = Path(java_command()).resolve().parent.parent
        settings = {
            "fs.defaultFS": self.uri,
            "yarn.scheduler.capacity.root.queues": "default",
            "yarn.scheduler.capacity.root.default.capacity": "100",
            "yarn.scheduler.capacity.maximum-am-resource-percent": "1.0",
            "yarn.scheduler.minimum-allocation-mb": "256",
            "yarn.nodemanager.resource.memory-mb": "6144",
            # Containers don't inherit this process' environment.
            "yarn.nodemanager.admin-env": f"JAVA_HOME={java_home}",
            # As on most clusters: a container that uses more memory than it asked for is killed.
            "yarn.nodemanager.pmem-check-enabled": "true",
            "yarn.nodemanager.vmem-check-enabled": "false",
            "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": "99",
        }
        configuration = self._hadoop.yarn.conf.YarnConfiguration()
        for name, value in settings.items():
            configuration.set(name, value)
        cluster = self._hadoop.yarn.server.MiniYARNCluster("yarn", NODES, 1, 1)
        cluster.init(configuration)
        cluster.start()
        assert cluster.waitForNodeManagersToConnect(60_000)
        return cluster

    def _environment(self) -> dict[str, str]:
        """Write the clients' settings, and return the variables that lead to them."""
        entries = "".join(
            f"<property><name>{name}</name><value>{escape(value)}</value></property>\n"
            for name, value in self._yarn.getConfig().getValByRegex(_CLIENTS_NEED).items()
        )
        settings = self._folder / "settings"
        settings.mkdir()
        (settings / "yarn-site.xml").write_text(f"<configuration>\n{entries}</configuration>\n")
        shutil.copy(settings / "yarn-site.xml", settings / "core-site.xml")
        (settings / "spark-defaults.conf").write_text(
            f"spark.yarn.jars local:{spark_home()}/jars/*\n"  # as where Spark is installed
            "spark.yarn.am.memory 512m\n"
            "spark.yarn.appMasterEnv.SPARK_LOCAL_IP 127.0.0.1\n"  # also of the executors
            "spark.ui.enabled false\n"
        )
        mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {
            **mine, "HADOOP_CONF_DIR": str(settings), "SPARK_CONF_DIR": str(settings),
            "SPARK_LOCAL_IP": "127.0.0.1",
        }  # fmt: skip


@contextlib.contextmanager
def hadoop(folder: Path) -> Iterator[Hadoop]:
    """Start HDFS and YARN in a new Java process, and stop them at exit.

    Parameters
    ----------
    folder : pathlib.Path
        A folder for their files; it is removed at exit.

    Yields
    ------
    Hadoop
        The cluster.
    """
    jars = [str(jar) for jar in fetch_jars(*HADOOP)]
    folder.mkdir()
    with (folder / "hadoop.log").open("w") as log:
        port, token, process = launch_gateway(
            classpath=os.pathsep.join([*jars, f"{spark_home()}/jars/*"]),
            javaopts=["-Xmx1g", "-XX:TieredStopAtLevel=1"], java_path=java_command(),
            cwd=folder, redirect_stdout=log, redirect_stderr=log, die_on_exit=True,
            enable_auth=True, return_proc=True,
        )  # fmt: skip
        parameters = GatewayParameters(port=port, auth_token=token, auto_convert=True)
        gateway = JavaGateway(gateway_parameters=parameters)
        try:
            cluster = Hadoop(gateway, folder)
            try:
                yield cluster
            finally:
                cluster.stop()
        finally:
            with contextlib.suppress(Py4JError, OSError):
                gateway.shutdown()
            process.stdin.close()
            try:
                process.wait(STOP_SECONDS)
            finally:
                process.kill()
                # YARN makes what it has unpacked read-only.
                subprocess.run(["chmod", "-R", "u+w", str(folder)], capture_output=True)
                shutil.rmtree(folder, ignore_errors=True)
