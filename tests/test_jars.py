"""Jars and Java: found, fetched once, or reported missing with a remedy."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import ROOT

from helpers.spark import jars

PROXY = "-D{0}.proxyHost=127.0.0.1 -D{0}.proxyPort=9"
UNREACHABLE = f"{PROXY.format('http')} {PROXY.format('https')}"
CONNECTOR = "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """An empty folder for jars."""
    monkeypatch.setattr(jars, "_all_folders", lambda: (tmp_path / "jars", tmp_path / "own"))
    return tmp_path / "jars"


@pytest.fixture
def empty_repository(monkeypatch, tmp_path):
    """Make Spark resolve from a site's repository, which is empty."""
    settings = tmp_path / "ivysettings.xml"
    settings.write_text(
        '<ivysettings><settings defaultResolver="site"/><resolvers><filesystem name="site">'
        f'<ivy pattern="{tmp_path}/[artifact].xml"/><artifact pattern="{tmp_path}/[artifact].jar"/>'
        "</filesystem></resolvers></ivysettings>"
    )
    (tmp_path / "spark-defaults.conf").write_text(f"spark.jars.ivySettings {settings}\n")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))


def test_what_is_fetched_already_needs_no_network(monkeypatch):
    """Jars that are already fetched need no network."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", UNREACHABLE)
    names = [jar.name for jar in jars.fetch_jars(CONNECTOR)]
    assert any(name.startswith("org.apache.kafka_kafka-clients-") for name in names)


def test_without_network_the_sentence_says_so(monkeypatch, empty_cache):
    """Without network, the error says that Maven Central can't be reached."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", UNREACHABLE)
    with pytest.raises(jars.JarsError, match=r"Maven Central can't be reached, and a:b:1\.0 must"):
        jars.fetch_jars("a:b:1.0")
    assert not list(empty_cache.iterdir())


@pytest.mark.parametrize(
    "failure",
    [
        "Network is unreachable", "No route to host", "Connect timed out", "Read timed out",
        "Connection reset", "PKIX path building failed: unable to find valid certification path",
        "Unable to tunnel through proxy. Proxy returns HTTP/1.1 407 Proxy Authentication Required",
    ],
)  # fmt: skip
def test_a_network_that_fails_is_not_taken_for_a_missing_jar(failure):
    """Ivy also says of a jar that it could not ask for that it was not found."""
    log = (
        f":::: ERRORS\n\tServer access error at url https://repo1.maven.org/a/b/1.0/b-1.0.pom "
        f"(java.net.SocketException: {failure})\n"
        ":: unresolved dependency: a#b;1.0: not found\n"
    )
    error = jars._explain(("a:b:1.0",), log)
    assert not isinstance(error, jars.NoSuchJarError)
    assert failure in str(error) and "set HTTPS_PROXY" in str(error) and "\n" not in str(error)


def test_java_takes_the_proxy_that_pip_takes(monkeypatch):
    """Java doesn't know HTTPS_PROXY, and would fail after pip has downloaded everything."""
    monkeypatch.setenv("SPARK_SUBMIT_OPTS", "-Dx=y")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.site:3128")
    options = jars._proxy_options()["SPARK_SUBMIT_OPTS"]
    assert options == "-Dhttps.proxyHost=proxy.site -Dhttps.proxyPort=3128 -Dx=y"
    monkeypatch.setenv("NO_PROXY", "localhost, .site")
    options = jars._proxy_options()["SPARK_SUBMIT_OPTS"]
    assert "-Dhttp.nonProxyHosts=localhost|*.site" in options.split()
    monkeypatch.delenv("HTTPS_PROXY")
    assert jars._proxy_options() == {}


def test_an_unknown_version_is_named(empty_cache, empty_repository):
    """A version that the repository doesn't have is named in the error."""
    with pytest.raises(jars.JarsError, match=r"has no org\.apache\.spark:connector:9\.9\.9: use"):
        jars.fetch_jars("org.apache.spark:connector:9.9.9")


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="only root on Linux can give a program another machine's name",
)
def test_a_container_needs_no_name_that_resolves(empty_repository):
    """Where the machine's name leads to no address, jars are still looked up."""
    rename = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    run = subprocess.run(
        [*rename, sys.executable, "-c", "from helpers.spark import *; fetch_jars('a:b:1.0')"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "SPARK_LOCAL_IP"},
    )  # fmt: skip
    assert "NoSuchJarError: Maven Central has no a:b:1.0" in run.stderr


def test_a_wrong_java_home_is_named(monkeypatch, tmp_path):
    """A JAVA_HOME without Java is named in the error."""
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(jars.JarsError, match=f"JAVA_HOME is {tmp_path}, .* correct or unset it"):
        jars.java_command()


def test_without_java_the_commands_are_given(monkeypatch, tmp_path):
    """Without Java, the error gives the install command for each system."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(jars.JarsError, match=r"Debian.*apt-get.*Fedora.*dnf.*macOS.*brew"):
        jars.java_command()


def test_jars_are_in_the_virtual_environment_or_the_users_cache(monkeypatch, tmp_path):
    """Jars are kept in the virtual environment, or without one in the user's cache."""
    assert jars.jars_folder().is_relative_to(jars.sys.prefix)
    monkeypatch.setattr(jars.sys, "prefix", str(tmp_path / "python"))
    monkeypatch.setattr(jars.sys, "base_prefix", jars.sys.prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert jars.jars_folder().is_relative_to(tmp_path / "cache")


def test_an_administrator_prepares_jars_for_a_python_without_virtual_environment(
    monkeypatch, tmp_path
):
    """Outside of a virtual environment, a `share/jars` that exists is used instead of the cache."""
    monkeypatch.setattr(jars.sys, "prefix", str(tmp_path / "python"))
    monkeypatch.setattr(jars.sys, "base_prefix", jars.sys.prefix)
    (tmp_path / "python" / "share" / "jars").mkdir(parents=True)
    assert jars.jars_folder() == tmp_path / "python" / "share" / "jars"


AS_ANOTHER_USER = f"""
from helpers.spark import fetch_jars, get_spark
from helpers.spark.jars import archive_option, jars_folder, spark_program
spark = get_spark(cores=1)
print(len(fetch_jars("{CONNECTOR}")), spark.range(3).count(), len(archive_option(spark_program())))
print(jars_folder())
"""


@pytest.mark.long
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="only root on Linux can run a program as another user",
)
def test_a_user_without_write_permission_uses_the_shared_jars():
    """All users read the environment's jars and class archive; only new jars go to their cache."""
    home = Path(tempfile.mkdtemp(prefix="home-"))
    # This user may read everything, also the home folder that this Python may be in.
    reader = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *reader]
    try:
        os.chown(home, 65534, 65534)
        run = subprocess.run(
            [*command, sys.executable, "-c", AS_ANOTHER_USER], cwd=ROOT, capture_output=True,
            text=True, timeout=300, stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": str(home), "JAVA_TOOL_OPTIONS": UNREACHABLE},
        )  # fmt: skip
        counted, folder = run.stdout.splitlines(), home / ".cache" / "kafka-spark-keras" / "jars"
        archives = len(jars.archive_option(jars.spark_program()))
        assert counted == [f"{len(jars.fetch_jars(CONNECTOR))} 3 {archives}", str(folder)], run
        assert not folder.exists()
    finally:
        shutil.rmtree(home)
