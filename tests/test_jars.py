"""Jars and Java: found, fetched once, or reported missing with a remedy."""

import pytest

from helpers.spark import jars

PROXY = "-D{0}.proxyHost=127.0.0.1 -D{0}.proxyPort=9"
UNREACHABLE = f"{PROXY.format('http')} {PROXY.format('https')}"
CONNECTOR = "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0"


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """An empty folder for jars."""
    monkeypatch.setattr(jars, "jars_folder", lambda: tmp_path / "jars")
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


def test_an_unknown_version_is_named(empty_cache, empty_repository):
    """A version that the repository doesn't have is named in the error."""
    with pytest.raises(jars.JarsError, match=r"has no org\.apache\.spark:connector:9\.9\.9: use"):
        jars.fetch_jars("org.apache.spark:connector:9.9.9")


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


def test_jars_live_in_the_virtual_environment_or_the_users_cache(monkeypatch, tmp_path):
    """Jars are kept in the virtual environment, or without one in the user's cache."""
    assert jars.jars_folder().is_relative_to(jars.sys.prefix)
    monkeypatch.setattr(jars.sys, "base_prefix", jars.sys.prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jars.jars_folder().is_relative_to(tmp_path)
