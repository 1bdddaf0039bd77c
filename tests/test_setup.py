"""What `make` installs, and what it says where Java or a fitting Python is missing."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from processes import ROOT

from helpers.spark.jars import INSTALL_JAVA

TOOLS = ("sh", "cat", "cksum", "tr", "id", "sed", "head", "dirname", "mkdir", "cp", "touch")

# In place of Python and uv, which would take minutes: it notes how it was called.
STAND_IN = """
case "$*" in
*"config list"*) cat pip.conf; exit;;
*"-m venv"*) mkdir -p .venv/bin; for name in python uv; do cp tools/python3 .venv/bin/$name; done;;
*broker.archive*) exit "$FETCH";;
esac
echo "${0##*/} $*, user $PIP_USER, cache $UV_CACHE_DIR, index $UV_DEFAULT_INDEX" >> calls
"""


@pytest.fixture
def bare(tmp_path):
    """A copy of what setup.sh reads, and a PATH that has only the usual tools."""
    for name in ("setup.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))
    return tmp_path


def setup(folder, **environment):
    """Run the copy of setup.sh with the bare PATH."""
    return subprocess.run(
        ["sh", "setup.sh"], cwd=folder, capture_output=True, text=True, timeout=600,
        env={"PATH": str(folder / "tools"), **environment},
    )


def program(folder, name, text):
    """Put a program on the bare PATH."""
    path = folder / "tools" / name
    path.write_text(f"#!{shutil.which('sh')}\n{text}\n")
    path.chmod(0o755)


def test_without_java_the_exact_commands_are_given(bare):
    """The message has the command to install Java on each system."""
    run = setup(bare)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "Java 17 or 21 is needed. Install it and call make again:",
        "  Debian, Ubuntu:  sudo apt-get install openjdk-21-jre-headless (or "
        "openjdk-17-jre-headless)",
        "  Fedora:          sudo dnf install java-21-openjdk-headless",
        f"  macOS:           {INSTALL_JAVA['brew']}",
    ]


def test_an_old_java_is_not_enough(bare):
    """Java below 17 is refused, on which Spark 4 can't start."""
    program(bare, "java", """echo 'openjdk version "11.0.2" 2019-01-15' >&2""")
    assert "Java 17 or 21 is needed" in setup(bare).stderr


@pytest.mark.parametrize(
    "variable, reason",
    [("JAVA_HOME", "which has no Java 17 or newer"), ("PYTHON", "which is not Python 3.11, 3.12")],
)
def test_a_variable_that_leads_elsewhere_is_named(complete, variable, reason):
    """Installing another Java or Python would change nothing."""
    run = setup(complete, **{variable: "/usr/nowhere"})
    assert run.returncode == 1 and "Install it" not in run.stderr
    assert f"{variable} is /usr/nowhere, {reason}" in run.stderr


def test_without_a_fitting_python_the_exact_commands_are_given(bare):
    """The message has the command to install a Python that the packages support."""
    program(bare, "java", """echo 'openjdk version "17.0.15" 2025-04-15' >&2""")
    run = setup(bare)
    assert run.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed." in run.stderr
    assert "sudo apt-get install python3 python3-venv" in run.stderr


@pytest.mark.parametrize("user, calls", [("0", 3), ("1000", 0)])
def test_only_root_has_packages_installed(bare, user, calls):
    """Root gets Java installed, others get the command. Like Debian 12, this system has no 21."""
    log = bare / "log"
    (bare / "tools" / "id").unlink()
    program(bare, "id", f"echo {user}")
    program(bare, "apt-get", f'echo "$@" >> {log}; case "$*" in *21*) exit 100;; esac')
    run = setup(bare)
    assert run.returncode == 1  # this apt-get installs nothing
    lines = log.read_text().splitlines() if log.exists() else []
    installs = [f"install -y openjdk-{version}-jre-headless" for version in (21, 17)]
    assert lines == ["update", *installs][:calls]


def test_a_second_call_needs_nothing(bare):
    """If everything is installed, neither the network nor pip is used."""
    program(bare, "java", """echo 'openjdk version "21.0.1" 2023-10-17' >&2""")
    stamp = subprocess.run(
        ["sh", "-c", "cat requirements.txt pyproject.toml | cksum | tr ' ' '-'"],
        cwd=bare, capture_output=True, text=True, check=True, env=os.environ,
    ).stdout.strip()
    (bare / ".venv").mkdir()
    (bare / ".venv" / f".installed-{stamp}").write_text(f"{bare}\n")
    other_name = bare.with_name("other-name")
    other_name.symlink_to(bare)
    for folder in (bare, other_name):
        run = setup(folder)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_moved_kit_is_installed_again(complete):
    """The paths in .venv are those of the old folder, whose code would run otherwise."""
    uv_call(complete)
    moved = complete.rename(complete.with_name("moved"))
    (moved / "calls").unlink()
    uv_call(moved)


@pytest.fixture
def complete(bare):
    """A system with Java and Python, which has no environment yet."""
    program(bare, "java", """echo 'openjdk version "21.0.1" 2023-10-17' >&2""")
    program(bare, "python3", STAND_IN)
    return bare


def uv_call(folder, **environment):
    """Run setup.sh, and return how it called uv."""
    run = setup(folder, FETCH="0", **environment)
    assert run.returncode == 0, run.stderr
    (call,) = [line for line in (folder / "calls").read_text().splitlines() if line[:3] == "uv "]
    return call


def test_the_uv_of_the_requirements_installs_them(complete):
    """The version is in one place, and its cache in the home folder."""
    call = uv_call(complete, HOME=str(complete / "home"))
    assert call.startswith("uv pip install --quiet --python .venv --compile-bytecode -r ")
    assert call.endswith(f", cache {complete}/home/.cache/uv, index ")
    (pinned,) = re.findall(r"^uv==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert f"-m pip install --quiet --disable-pip-version-check {pinned}," in (
        complete / "calls"
    ).read_text()


@pytest.mark.parametrize("home", ["", "setup.sh"])
def test_without_a_home_folder_the_cache_is_in_the_environment(complete, home):
    """A home that is not a folder can't be written, as a service's account has it."""
    call = uv_call(complete, HOME=home and str(complete / home))
    assert f", cache {complete}/.venv/uv," in call


@pytest.mark.parametrize("place", ["variable", "file"])
def test_pips_mirror_is_uvs_too(complete, place):
    """An index that is configured for pip, wherever that is, reaches uv, for a closed network."""
    file = complete / "site.conf"
    file.write_text("[global]\nindex-url = https://mirror/simple\n")
    given = {"PIP_INDEX_URL": "https://mirror/simple"}
    if place == "file":
        given = {"PIP_CONFIG_FILE": str(file)}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], env=given, capture_output=True, text=True
    )
    (complete / "pip.conf").write_text(listed.stdout)
    assert uv_call(complete).endswith(", index https://mirror/simple")


def test_settings_of_a_site_lead_to_no_other_environment(complete):
    """`pip install --user`, as a site may set it, would fail in an environment."""
    call = uv_call(complete, PIP_USER="1", UV_PYTHON="/usr/bin/python3", UV_SYSTEM_PYTHON="1")
    assert ", user 0, " in call


def test_jars_that_cannot_be_fetched_fail_the_setup(complete):
    """The next call begins again."""
    assert setup(complete, FETCH="3").returncode == 3
    assert not list((complete / ".venv").glob(".installed-*"))
