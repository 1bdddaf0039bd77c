"""The `java` command, and jars from Maven Central.

PySpark ships a Maven resolver (Apache Ivy, used by ``spark-submit --packages``), so PySpark and
Java are enough to run a Kafka broker or to add Spark's Kafka connector.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyspark

CONNECTOR = "org.apache.spark:spark-sql-kafka-0-10_{scala}:{spark}"
RESOLVE_SECONDS = 300

# `spark-submit` resolves packages before it runs a class. This one, which every Spark has, only
# prints the version of Hadoop.
_HARMLESS_MAIN_CLASS = "org.apache.hadoop.util.VersionInfo"

# The command for each system's package manager. Homebrew doesn't put its Java on PATH.
INSTALL_JAVA = {
    # Debian 13 has no 17, and Debian 12 no 21; "default-jre" is 11 on older releases.
    "apt-get": "sudo apt-get update && (sudo apt-get install -y openjdk-21-jre-headless || "
    "sudo apt-get install -y openjdk-17-jre-headless)",
    "dnf": "sudo dnf install java-21-openjdk-headless",
    "brew": 'brew install openjdk@21 && export JAVA_HOME="$(brew --prefix openjdk@21)"',
}
_SYSTEMS = {"apt-get": "Debian and Ubuntu", "dnf": "Fedora", "brew": "macOS"}


class JarsError(RuntimeError):
    """Java or a required jar is missing; the message says what to do."""


class NoSuchJarError(JarsError):
    """Maven Central doesn't have this version of a jar, so retrying doesn't help."""


def java_command() -> str:
    """Return the path of the `java` that Spark uses: from ``JAVA_HOME``, otherwise ``PATH``.

    Raises
    ------
    JarsError
        If there is none; the message says how to install it.

    Examples
    --------
    >>> java_command().endswith("java")
    True
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        candidate = Path(home) / "bin" / "java"
        if not candidate.is_file():
            raise JarsError(f"JAVA_HOME is {home}, but there is no bin/java: correct or unset it.")
        return str(candidate)
    found = shutil.which("java")
    if found is None:
        how = "; ".join(f"{_SYSTEMS[name]}: {command}" for name, command in INSTALL_JAVA.items())
        raise JarsError(f"Java 17 or 21 is needed and there is no `java` on PATH. {how}")
    return found


def spark_home() -> Path:
    """Return the folder of the Spark that `import pyspark` uses: the site's, or PySpark's.

    Returns
    -------
    pathlib.Path
        The folder with ``bin/spark-submit`` and ``jars/``.

    Examples
    --------
    >>> (spark_home() / "bin" / "spark-submit").exists()
    True
    """
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent)


def spark_and_scala() -> tuple[str, str]:
    """Return the versions of the Spark that will be started and of its Scala, such as '2.13'.

    Raises
    ------
    JarsError
        If `spark_home` has no Spark.

    Examples
    --------
    >>> spark, scala = spark_and_scala()
    >>> scala
    '2.13'
    """
    for jar in (spark_home() / "jars").glob("spark-core_*.jar"):
        scala, spark = re.fullmatch(r"spark-core_(\d+\.\d+)-(.+)\.jar", jar.name).groups()
        return spark, scala
    raise JarsError(f"{spark_home()} has no jars/spark-core_*.jar: set SPARK_HOME to a Spark.")


def fetch_jars(*coordinates: str) -> list[Path]:
    """Return the jars for Maven coordinates and their dependencies, fetched on the first call.

    The jars are kept in `jars_folder`; later calls need no network. Jars in ``share/jars`` of the
    Python environment are also found if only an administrator can write there, as in the image of a
    JupyterHub.

    Parameters
    ----------
    *coordinates : str
        One or more of ``group:artifact:version``.

    Returns
    -------
    list of pathlib.Path
        The jar files, sorted by name. Jars that Spark ships (scala-library) are not included.

    Raises
    ------
    NoSuchJarError
        If Maven Central doesn't have one of the jars.
    JarsError
        If Maven Central can't be reached, or Java is missing.

    Examples
    --------
    >>> jars = fetch_jars("org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0")
    >>> any("kafka-clients" in jar.name for jar in jars)
    True
    """
    name = "+".join("-".join(coordinate.split(":")[1:]) for coordinate in coordinates)
    for folder in _all_folders():
        if os.path.isdir(folder / name):  # also if the user may not read its parent
            return sorted((folder / name).glob("*.jar"))
    folder = jars_folder() / name
    _resolve(coordinates, folder)
    return sorted(folder.glob("*.jar"))


def jars_folder() -> Path:
    """Return the folder in which `fetch_jars` keeps new jars.

    It is ``share/jars`` of the virtual environment, or the same folder of another Python if it
    exists. If that can't be written, it is in the user's cache.

    Examples
    --------
    >>> jars_folder().name
    'jars'
    """
    shared, own = _all_folders()
    if sys.prefix == sys.base_prefix and not shared.is_dir():
        return own
    existing = next(folder for folder in (shared, *shared.parents) if folder.is_dir())
    return shared if os.access(existing, os.W_OK) else own


def _all_folders() -> tuple[Path, Path]:
    """Return the folders that may have jars: the environment's, and that in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(sys.prefix) / "share" / "jars", Path(cache) / "kafka-spark-keras" / "jars"


def spark_program() -> str:
    """Return the name and version of the Spark that will be started, such as 'spark-4.2.0'.

    Examples
    --------
    >>> spark_program().startswith("spark-")
    True
    """
    return f"spark-{spark_and_scala()[0]}"


def archive_option(program: str) -> list[str]:
    """Return the option with which Java uses a program's class archive; none without an archive.

    An archive has a program's classes as they are in memory ("class data sharing"). Java loads them
    from it in half the time. `make setup` writes the archives.

    Parameters
    ----------
    program : str
        The program and its version.

    Examples
    --------
    >>> archive_option("kafka-0.8")
    []
    """
    for folder in _all_folders():
        readable = os.access(folder, os.R_OK | os.X_OK)
        for archive in folder.glob(f"{_archive_name(program)}-*.jsa") if readable else ():
            # Java crashes if a part is missing, for example after an interrupted copy.
            if archive.stem.endswith(f"-{archive.stat().st_size}"):
                return [f"-XX:SharedArchiveFile={archive}"]
    return []


def fork_option() -> list[str]:
    """Return the option with which Java starts other programs in half the time; none if unknown.

    On local disks, Spark starts ``chmod`` for each file and folder, a dozen times per batch: 8 ms
    each, and 4 ms with this. Java 25 deprecates the option, and only Linux has it.

    Examples
    --------
    >>> len(fork_option()) <= 1
    True
    """
    release = Path(java_command()).resolve().parent.parent / "release"
    text = release.read_text() if release.exists() else ""
    version = re.search(r'^JAVA_VERSION="(\d+)', text, re.MULTILINE)
    if sys.platform != "linux" or not version or int(version[1]) >= 25:
        return []
    return ["-Djdk.lang.Process.launchMechanism=VFORK"]


@contextlib.contextmanager
def new_archive(program: str) -> Iterator[str]:
    """Keep the class archive that a Java process in this block writes when it exits.

    Parameters
    ----------
    program : str
        The program and its version.

    Yields
    ------
    str
        The option for Java.

    Raises
    ------
    OSError
        If Java has written no archive, or one that it can't use.

    Examples
    --------
    >>> with contextlib.suppress(OSError), new_archive("nothing") as option:
    ...     print(option.partition("=")[0])
    -XX:ArchiveClassesAtExit
    """
    folder = jars_folder()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{program}.{os.getpid()}"
    try:
        yield f"-XX:ArchiveClassesAtExit={unfinished}"
        trial = [java_command(), f"-XX:SharedArchiveFile={unfinished}", "-version"]
        if subprocess.run(trial, capture_output=True).returncode:
            raise OSError("Java can't use the class archive that it has written")
        name = f"{_archive_name(program)}-{unfinished.stat().st_size}.jsa"
        unfinished.replace(folder / name)
        for archive in folder.glob(f"{program}-*.jsa"):
            if archive.name != name:
                archive.unlink(missing_ok=True)
    finally:
        unfinished.unlink(missing_ok=True)


def _archive_name(program: str) -> str:
    """Return the name of an archive without its size; Java can't use one of another Java."""
    home = Path(java_command()).resolve().parent.parent
    library = next(home.glob("lib/**/libjvm.*"), home)
    java = f"{home} {library.stat().st_mtime_ns} {library.stat().st_size}"
    return f"{program}-{zlib.crc32(java.encode()):08x}"


def _resolve(coordinates: tuple[str, ...], folder: Path) -> None:
    """Fetch the jars with Ivy, and move them to `folder` atomically when they are complete."""
    java_command()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".resolving-") as ivy:
        command = [str(spark_home() / "bin" / "spark-submit"), "--conf", f"spark.jars.ivy={ivy}"]
        command += ["--packages", ",".join(coordinates), "--class", _HARMLESS_MAIN_CLASS]
        try:
            run = subprocess.run(
                [*command, "spark-internal"], capture_output=True, text=True,
                timeout=RESOLVE_SECONDS, stdin=subprocess.DEVNULL,
                # Otherwise Spark looks up this machine's name, which a container may not know.
                env={"SPARK_LOCAL_IP": "127.0.0.1", **os.environ, **_proxy_options()},
            )
        except subprocess.TimeoutExpired:
            raise JarsError(
                f"Maven Central did not deliver {', '.join(coordinates)} within "
                f"{RESOLVE_SECONDS} s: check the connection and try again."
            ) from None
        if run.returncode != 0:
            raise _explain(coordinates, run.stdout + run.stderr)
        try:
            os.rename(Path(ivy) / "jars", folder)
        except OSError:  # another process was faster, and its jars are the same
            if not folder.is_dir():
                raise


def _proxy_options() -> dict[str, str]:
    """Return the variable that passes the proxy of HTTPS_PROXY to Java, which ignores that one."""
    address = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    proxy = urlsplit(address if "//" in address else f"//{address}") if address else None
    if proxy is None or not proxy.hostname:
        return {}
    options = [f"-Dhttps.proxyHost={proxy.hostname}", f"-Dhttps.proxyPort={proxy.port or 80}"]
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = [host.strip() for host in direct.split(",") if host.strip()]
    if hosts:  # for Java, a domain begins with an asterisk
        patterns = [f"*{host}" if host.startswith(".") else host for host in hosts]
        options.append(f"-Dhttp.nonProxyHosts={'|'.join(patterns)}")
    # Of an option that is given twice, Java takes the last: the user's own.
    return {"SPARK_SUBMIT_OPTS": " ".join([*options, os.environ.get("SPARK_SUBMIT_OPTS", "")])}


def _explain(coordinates: tuple[str, ...], log: str) -> JarsError:
    """Return an error that summarizes Ivy's log in one sentence."""
    # Ivy then also says that the jar was not found.
    failed = re.search(r"Server access error[^\n]*|(?:CLIENT|SERVER) ERROR[^\n]*", log)
    is_unreachable = r"Host \S*maven\S* not found|UnknownHost|Connection (refused|timed out)"
    if failed or re.search(is_unreachable, log):
        reason = f" ({' '.join(failed[0].split())})" if failed else ""
        return JarsError(
            f"Maven Central can't be reached, and {', '.join(coordinates)} must be fetched from it "
            "once: connect to the network and try again. Behind a proxy, set HTTPS_PROXY."
            f"{reason}"
        )
    unresolved = re.findall(r"unresolved dependency: (\S+?)#(\S+?);(\S+?): not found", log)
    if unresolved:
        missing = ", ".join(":".join(parts) for parts in dict.fromkeys(unresolved))
        return NoSuchJarError(f"Maven Central has no {missing}: use a version that it has.")
    tail = "\n".join(log.strip().splitlines()[-8:])
    return JarsError(f"fetching {', '.join(coordinates)} failed; the log ends with:\n{tail}")
