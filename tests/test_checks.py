"""The checks before a run: each thing is broken for real, and its remedy mends it."""

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pyspark
import pytest
from processes import ROOT, run_python, running

from helpers import checks, jars
from helpers.broker import LOOPBACK, check_address, free_port
from helpers.notebook import find_notebook, parameters
from helpers.session import main, preflight

PROXY = "-D{0}.proxyHost=127.0.0.1 -D{0}.proxyPort=9"
UNREACHABLE = f"{PROXY.format('http')} {PROXY.format('https')}"
PYSPARK = Path(pyspark.__file__).parent
JAVA = os.path.realpath(shutil.which("java"))
SH, LN, SLEEP = shutil.which("sh"), shutil.which("ln"), shutil.which("sleep")
MODULES = "numpy, pandas, pyarrow, orjson, keras, tensorflow"


@pytest.fixture
def apply(monkeypatch):
    """Run a remedy in a shell, and take over what it changes in the shell's environment."""

    def run(remedy):
        tell = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
        shell = subprocess.run(
            [SH, "-c", f"{remedy} && exec {shlex.join(tell)}"],
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
        )
        assert shell.returncode == 0, shell.stdout + shell.stderr
        environment = json.loads(shell.stdout.splitlines()[-1])
        for name in os.environ.keys() - environment.keys():
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return run


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """An empty folder that is the whole PATH, and no JAVA_HOME."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return folder


@pytest.fixture
def installer(tools):
    """A package manager on the PATH whose Java is the real one of this machine."""

    def put(name):
        if name == "brew":
            link(JAVA, tools.parent / "openjdk@21" / "bin" / "java")
            program(tools, name, f'test "$1" = --prefix && echo {tools.parent}/"$2" || true')
        else:
            program(tools, name, f"{LN} -sf {JAVA} {tools}/java")
        program(tools, "sudo", 'exec "$@"')

    return put


@pytest.fixture
def impatient(monkeypatch):
    """Make a check that waits a second only, for what never answers."""

    def check(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(checks, "ANSWER_SECONDS", 1)
            patch.setattr(checks, "PROGRAM_SECONDS", 1)
            return function(*arguments)

    return check


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The Python of a virtual environment that has nothing, not even pip."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run = run_python("-m", "venv", "--without-pip", str(folder))
    assert run.returncode == 0, run.stderr
    return str(folder / "bin" / "python")


@pytest.fixture
def check_in(bare_python, tmp_path, monkeypatch):
    """Make a check in another environment: all packages, but no jars, and the kit not installed."""
    packages = tmp_path / "packages"
    for entry in PYSPARK.parent.iterdir():
        if "kafka_spark_keras" not in entry.name:
            link(entry, packages / entry.name)
    monkeypatch.setenv("PYTHONPATH", str(packages))

    def check(call):
        return ask(bare_python, call)

    yield check
    shutil.rmtree(Path(bare_python).parent.parent / "share", ignore_errors=True)


def ask(python, call):
    """Make a check in another process."""
    run = subprocess.run(
        [python, "-c", f"import json; from helpers.checks import *; print(json.dumps({call}))"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return checks.Check(*json.loads(run.stdout))


def link(target, path):
    """Make a symbolic link, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def program(folder, name, text, interpreter=SH):
    """Put a program into a folder, and return its path."""
    path = folder / name
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def own_rights(command):
    """Return a command as it is told to this user, who may be root."""
    return command.replace("sudo ", "") if os.geteuid() == 0 else command


def sites_spark(folder, version):
    """Make a folder with a Spark of another version, which is PySpark's in truth."""
    link(PYSPARK / "bin", folder / "bin")
    for jar in (PYSPARK / "jars").iterdir():
        name = f"spark-core_2.13-{version}.jar" if jar.name.startswith("spark-core_") else jar.name
        link(jar, folder / "jars" / name)
    return str(folder)


def repository(folder, pattern):
    """Have Spark resolve from a repository of one's own, as sites do it, not from Maven Central."""
    settings = folder / "ivysettings.xml"
    settings.write_text(
        '<ivysettings><settings defaultResolver="site"/><resolvers><filesystem name="site">'
        f'<artifact pattern="{pattern}"/></filesystem></resolvers></ivysettings>'
    )
    (folder / "spark-defaults.conf").write_text(f"spark.jars.ivySettings {settings}\n")
    return str(folder)


@contextlib.contextmanager
def plain_socket():
    """Occupy a port with something that takes connections and is no Kafka broker."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_wrong_java_home_is_unset(monkeypatch, apply):
    """Otherwise a JAVA_HOME of an uninstalled Java would stop all, with a good Java on PATH."""
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    java = checks.check_java()
    found = "JAVA_HOME is /nowhere, where there is no bin/java"
    assert java[1:] == (False, found, "unset JAVA_HOME")
    apply(java.remedy)
    assert checks.check_java().ok


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "brew"])
@pytest.mark.parametrize("java_home", [None, "/nowhere"])
def test_without_java_the_command_of_this_system_installs_it(
    monkeypatch, installer, apply, manager, java_home
):
    """Otherwise a newcomer would have to choose among the commands of three systems."""
    installer(manager)
    if java_home:
        monkeypatch.setenv("JAVA_HOME", java_home)
    java = checks.check_java()
    install = own_rights(jars.INSTALL_JAVA[manager])
    assert not java.ok
    assert java.remedy == (f"unset JAVA_HOME && {install}" if java_home else install)
    apply(java.remedy)
    assert checks.check_java().ok


def test_without_a_known_package_manager_java_is_still_asked_for(tools):
    """Otherwise the table would have no remedy on other systems."""
    assert checks.check_java()[1:] == (
        False, "no java on PATH", "install Java 17 or 21, and put it on PATH"
    )


@pytest.mark.parametrize(
    "says, found",
    [
        ("""echo 'openjdk version "11.0.2" 2019-01-15' >&2""", "11.0.2, but 17 or newer is needed"),
        ("""echo 'java version "1.8.0_392"' >&2""", "1.8.0_392, but 17 or newer is needed"),
        ("echo 'Unable to locate a Java Runtime.' >&2; exit 1", "doesn't tell its version"),
    ],
)
def test_an_old_java_is_replaced(tools, installer, apply, says, found):
    """Otherwise Spark would fail with an UnsupportedClassVersionError."""
    installer("apt-get")
    program(tools, "java", says)
    java = checks.check_java()
    assert not java.ok
    assert found in java.found
    apply(java.remedy)
    assert checks.check_java().ok


def test_an_old_java_of_java_home_gives_way_to_a_new_one_on_path(monkeypatch, tmp_path, apply):
    """Otherwise a Java would be installed that is there already."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "java", """echo 'openjdk version "11.0.2" 2019-01-15' >&2""")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    java = checks.check_java()
    assert (java.ok, java.remedy) == (False, "unset JAVA_HOME")
    apply(java.remedy)
    assert checks.check_java().ok


def test_a_spark_home_without_spark_is_unset(monkeypatch, tmp_path, apply):
    """Otherwise a wrong SPARK_HOME would be known only from the failure of the first session."""
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    spark, connector = checks.check_spark(), checks.check_connector()
    assert (spark.ok, spark.remedy) == (connector.ok, connector.remedy) == (
        False, "unset SPARK_HOME"
    )
    apply(spark.remedy)
    assert checks.check_spark().ok
    assert checks.check_connector().ok


@pytest.mark.parametrize(
    "version, found",
    [("3.5.1", "but one like"), ("4.99.0", f"but PySpark is {pyspark.__version__}")],
)
def test_a_sites_spark_of_another_version_is_unset(monkeypatch, tmp_path, apply, version, found):
    """Otherwise PySpark would fail against a Java side that has other methods."""
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path, version))
    spark = checks.check_spark()
    assert (spark.ok, spark.remedy) == (False, "unset SPARK_HOME")
    assert f"Spark {version} in {tmp_path}, {found}" in spark.found
    apply(spark.remedy)
    assert checks.check_spark().ok


def test_a_sites_spark_of_the_same_version_is_good(monkeypatch, tmp_path):
    """Otherwise a site's users would be sent away from the Spark that they are to use."""
    version = f"{pyspark.__version__}-site1"
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path, version))
    assert checks.check_spark()[1:] == (True, f"{version}, {tmp_path}", "")


def test_another_pyspark_is_replaced_by_the_pinned_one(monkeypatch, tmp_path, apply):
    """Otherwise a run would look for a connector that nobody tested, or that doesn't exist."""
    for entry in PYSPARK.iterdir():
        if entry.name != "version.py":
            link(entry, tmp_path / "pyspark" / entry.name)
    (tmp_path / "pyspark" / "version.py").write_text('__version__ = "4.1.9"\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spark = ask(sys.executable, "check_spark()")
    pinned = f"pyspark=={pyspark.__version__}"
    assert spark[1:3] == (False, f"PySpark 4.1.9, but {pinned} is needed")
    assert spark.remedy == shlex.join([sys.executable, "-m", "pip", "install", pinned])
    # The pinned one is installed here, behind the other, so pip needs no network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    apply(spark.remedy)
    monkeypatch.delenv("PYTHONPATH")
    assert ask(sys.executable, "check_spark()").ok


def test_the_pinned_version_is_known_without_an_installation(check_in):
    """Otherwise the check would fail in a clone that is used as it is."""
    assert check_in("check_spark()").ok


def test_jars_that_cannot_be_fetched_are_when_the_network_is_back(
    monkeypatch, tmp_path, check_in, apply
):
    """Otherwise a run without network would fail in its middle, with pages of a resolver's log."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", UNREACHABLE)
    connector, broker = check_in("check_connector()"), check_in("check_broker()")
    for check in (connector, broker):
        assert not check.ok
        assert "Maven Central can't be reached" in check.found
        assert check.remedy.endswith("# once the network is there")
    assert connector.remedy == broker.remedy
    # The network: a repository with the jars that this environment has.
    monkeypatch.delenv("JAVA_TOOL_OPTIONS")
    have = tmp_path / "have"
    for folder in jars.jars_folder().iterdir():
        for jar in folder.glob("*.jar"):
            if not (have / jar.name).exists():
                link(jar, have / jar.name)
    pattern = f"{have}/[organisation]_[artifact]-[revision].jar"
    monkeypatch.setenv("SPARK_CONF_DIR", repository(tmp_path, pattern))
    apply(f"{connector.remedy}\ntrue")
    assert check_in("check_connector()").ok
    assert check_in("check_broker()").ok


def test_jars_that_cannot_be_fetched_without_java_ask_for_java(installer, check_in):
    """Otherwise the command told would fail for want of Java."""
    installer("dnf")
    connector = check_in("check_connector()")
    assert not connector.ok
    assert connector.remedy == own_rights(jars.INSTALL_JAVA["dnf"])


def test_a_sites_spark_without_a_connector_is_unset(monkeypatch, tmp_path, apply):
    """Otherwise the user would be told to try again, which can't help."""
    version = f"{pyspark.__version__}-site1"
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path / "spark", version))
    monkeypatch.setenv("SPARK_CONF_DIR", repository(tmp_path, f"{tmp_path}/[artifact].jar"))
    connector = checks.check_connector()
    assert (connector.ok, connector.remedy) == (False, "unset SPARK_HOME")
    assert f"has no org.apache.spark:spark-sql-kafka-0-10_2.13:{version}" in connector.found
    apply(connector.remedy)
    assert checks.check_connector().ok


@pytest.mark.parametrize("has_pip", [True, False])
def test_what_the_workers_python_lacks_is_installed(
    monkeypatch, tmp_path, apply, bare_python, has_pip
):
    """Otherwise the first batch would fail with 'No module named numpy' on the workers."""
    link(Path(bare_python).parent.parent / "pyvenv.cfg", tmp_path / "pyvenv.cfg")
    python = tmp_path / "bin" / "python"
    link(os.path.realpath(bare_python), python)
    release = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = tmp_path / "lib" / release / "site-packages"
    packages.mkdir(parents=True)
    if has_pip:
        link(Path(importlib.util.find_spec("pip").origin).parent, packages / "pip")
    monkeypatch.setenv("PYSPARK_PYTHON", str(python))
    workers = checks.check_worker_python()
    assert workers[1:3] == (False, f"{python} can't import {MODULES}")
    installs = f"{python} -m pip" if has_pip else f"{sys.executable} -m pip --python {python}"
    assert workers.remedy.startswith(f"{installs} install numpy==")
    for requirement in workers.remedy.split(" install ")[1].split():
        make_wheel(tmp_path, *requirement.split("=="))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    apply(workers.remedy)
    assert checks.check_worker_python().ok


def make_wheel(folder, name, version):
    """Write a package that pip can install, with an empty module."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


PRETENDS = """
import sys, sysconfig
{pretended}
program, sys.argv = sys.argv[2], sys.argv[2:]
exec(program)
"""
OLDER = 'sys.version_info = (3, 9, 1, "final", 0)'
SYSTEMS_OWN = "sys.prefix = sys.base_prefix; sysconfig.get_path = lambda name: {folder!r}"


@pytest.mark.parametrize(
    "broken, found",
    [
        ("nowhere", "is no Python that runs"),
        ("says nothing", "is no Python that runs"),
        ("never answers", "is no Python that runs"),
        ("is older", "3.9, but this is "),
        ("is the system's own", f"can't import {MODULES}"),
    ],
)
def test_a_wrong_workers_python_is_replaced_by_this_one(
    monkeypatch, tmp_path, apply, impatient, bare_python, broken, found
):
    """Otherwise the workers would not start, or pip refuse to install what they need."""
    program(tmp_path, "says nothing", "true")
    program(tmp_path, "never answers", f"exec {SLEEP} 600")
    program(tmp_path, "is older", PRETENDS.format(pretended=OLDER), sys.executable)
    own = PRETENDS.format(pretended=SYSTEMS_OWN.format(folder=str(tmp_path)))
    program(tmp_path, "is the system's own", own, bare_python)
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setenv("PYSPARK_PYTHON", str(tmp_path / broken))
    check = checks.check_worker_python
    workers = impatient(check) if broken == "never answers" else check()
    assert not workers.ok
    assert found in workers.found
    assert workers.remedy == f"export PYSPARK_PYTHON={sys.executable}"
    apply(workers.remedy)
    assert checks.check_worker_python().ok


ON_A_CLUSTER = """
import json, os, sys, threading, time
from pyspark import SparkConf, SparkContext
from helpers import checks
python, spark, marker = sys.argv[1:]
os.environ["SPARK_HOME"] = spark
settings = {
    "spark.master": "local-cluster[1,1,512]", "spark.app.name": "cluster",
    "spark.executor.memory": "512m", "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
}
os.environ["PYSPARK_PYTHON"] = python
context = SparkContext(conf=SparkConf().setAll(settings.items()))
found = {"bare": checks.check_worker_python()}
context.pythonExec = sys.executable
found["this"] = checks.check_worker_python()
context.pythonExec = "/no/such/python"
found["nowhere"] = checks.check_worker_python()

def occupy(_):
    open(marker, "w").close()
    time.sleep(600)

context.pythonExec = sys.executable
checks.EXECUTORS_SECONDS = 2
threading.Thread(
    target=lambda: context.parallelize([1], 1).foreach(occupy), daemon=True
).start()
while not os.path.exists(marker):
    time.sleep(0.05)
found["busy"] = checks.check_worker_python()
print(json.dumps(found))
sys.stdout.flush()
context.stop()
"""


def test_the_executors_of_a_cluster_are_asked(monkeypatch, tmp_path, bare_python):
    """Otherwise the driver's own Python would pass for that of a cluster's machines."""
    for part in ("bin", "jars", "python"):
        link(PYSPARK / part, tmp_path / "spark" / part)
    arguments = [bare_python, str(tmp_path / "spark"), str(tmp_path / "marker")]
    run = run_python("-c", ON_A_CLUSTER, *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    found = {name: checks.Check(*check) for name, check in json.loads(run.stdout).items()}
    assert found["bare"].found == f"{bare_python} on an executor can't import {MODULES}"
    assert f"--python {bare_python} install numpy==" in found["bare"].remedy
    assert found["this"].ok
    assert found["this"].found.endswith(f"{sys.executable} on an executor")
    assert found["nowhere"].remedy == f"export PYSPARK_PYTHON={sys.executable}"
    assert found["busy"].found.startswith("no executor of local-cluster[1,1,512] answers within")
    assert found["busy"].remedy.endswith("EXECUTORS=1 CORES=1 MEMORY=1g")


def test_a_broker_that_answers_is_found(kafka):
    """Otherwise a run on a good broker would be held up."""
    assert checks.check_broker(kafka.bootstrap_servers)[1:] == (
        True, f"answers at {kafka.bootstrap_servers}", ""
    )


@pytest.mark.parametrize("taken", [False, True])
def test_a_missing_broker_is_started(impatient, taken):
    """Otherwise the first cell that reads the topic would wait, and fail without advice."""
    with plain_socket() if taken else contextlib.nullcontext(free_port()) as port:
        broker = impatient(checks.check_broker, f"{LOOPBACK}:{port}")
        assert broker[1:3] == (
            False, f"no Kafka broker answers at {LOOPBACK}:{port} within 1 s"
        )
        command = shlex.split(broker.remedy)
        assert command[:-1] == [sys.executable, "-m", "helpers.broker", "--port"]
        assert (command[-1] == str(port)) is not taken
        with running(command) as process:
            assert process.stdout.readline().startswith("ready at")
            assert checks.check_broker(f"{LOOPBACK}:{command[-1]}").ok


def test_a_broker_elsewhere_is_to_be_looked_after(impatient):
    """Otherwise the user would start a broker here that the cluster doesn't reach."""
    broker = impatient(checks.check_broker, "no.such.host.invalid:9092")
    assert not broker.ok
    assert broker.remedy == "check the address, and that the broker runs there"


@pytest.mark.parametrize(
    "malformed, corrected",
    [
        ("127.0.0.1", "127.0.0.1:9092"),
        ("kafka.example", "kafka.example:9092"),
        ("kafka.example:http", "kafka.example:9092"),
        (":9093", "127.0.0.1:9093"),
        ("9093", "127.0.0.1:9093"),
        ("one:9093,two", "one:9093"),
    ],
)
def test_a_malformed_address_is_corrected(malformed, corrected):
    """Otherwise the client would wait for a host that nobody meant."""
    broker = checks.check_broker(malformed)
    assert not broker.ok
    assert "is no address of a Kafka broker: write host:port." in broker.found
    assert shlex.split(broker.remedy) == [
        sys.executable, "-m", "helpers.session", "--bootstrap-servers", corrected
    ]
    check_address(corrected)


def test_too_much_memory_is_made_less():
    """Otherwise the machine would swap, or kill the run in its middle."""
    memory = checks.check_memory("9000g", cores=2)
    assert not memory.ok
    assert "9,002.0 GB needed" in memory.found
    make, run, *settings = shlex.split(memory.remedy)
    values = dict(setting.split("=") for setting in settings)
    assert (make, run) == ("make", "run")
    notebook = nbformat.read(find_notebook("1_walkthrough"), as_version=4)
    assert {name.lower() for name in values} <= parameters(notebook).keys()
    assert checks.check_memory(values["MEMORY"], int(values["CORES"])).ok


def test_more_cores_need_more_memory():
    """Otherwise a laptop with 16 of them would be filled by as many TensorFlows."""
    assert "9,003.2 GB needed" in checks.check_memory("9000g", cores=4).found


@pytest.mark.parametrize("malformed", ["2", "g", "2 gigabytes", ""])
def test_what_is_no_amount_of_memory_is_corrected(malformed):
    """Otherwise Java would not start, with a sentence of its own."""
    memory = checks.check_memory(malformed)
    assert not memory.ok
    assert checks.check_memory(shlex.split(memory.remedy)[-1]).ok


@pytest.mark.parametrize(
    "own, folder, names, cache",
    [
        ("0::/pod\n", "pod", ("memory.max", "memory.current"), "inactive_file"),
        ("0::/elsewhere\n", "", ("memory.max", "memory.current"), "inactive_file"),
        (
            "5:cpu:/\n4:memory:/docker/1\n0::/\n", "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file",
        ),
    ],
)
def test_a_containers_limit_counts(monkeypatch, tmp_path, own, folder, names, cache):
    """Otherwise a container of 4 GB would be taken for the machine that it is on, and be killed."""
    limit, used = names
    group = tmp_path / "cgroup" / folder
    group.mkdir(parents=True)
    (tmp_path / "own").write_text(own)
    (group / used).write_text(f"{3 * 2**30}\n")
    (group / "memory.stat").write_text(f"anon 1\n{cache} {2**30}\n")
    monkeypatch.setattr(checks, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(checks, "_CGROUPS", tmp_path / "cgroup")
    (group / limit).write_text(f"{4 * 2**30}\n")
    memory = checks.check_memory("1g", 2)
    less = "make run MEMORY=1g CORES=1"
    assert memory[1:] == (False, "2.0 GB free, 3.0 GB needed", f"{less}  # once 3 GB are free")
    (group / limit).write_text(f"{6 * 2**30}\n")
    assert checks.check_memory("2g", 2) == checks.check_memory("1g", 2)._replace(
        found="4.0 GB free, 4.0 GB needed"
    )
    assert checks.check_memory("3g", 2).remedy == less
    (group / limit).write_text("max\n" if limit == "memory.max" else "9223372036854771712\n")
    assert checks.check_memory("1g", 2).ok


@pytest.mark.parametrize(
    "folder, found",
    [
        ("/proc", "0.0 GB free in /proc, 1.0 GB needed"),
        ("/no/such/folder", "/no/such/folder can't be used: No such file or directory"),
        ("/etc/passwd", "/etc/passwd can't be used: Not a directory"),
    ],
)
def test_a_temporary_folder_without_space_is_replaced(monkeypatch, apply, folder, found):
    """Otherwise the broker's or Spark's files would fill the disk in the middle of a run."""
    monkeypatch.setenv("TMPDIR", folder)
    disk = checks.check_disk()
    assert disk[1:3] == (False, found)
    assert disk.remedy.startswith("export TMPDIR=/")
    apply(disk.remedy)
    assert checks.check_disk().ok


def test_a_port_that_something_else_has_is_replaced(impatient):
    """Otherwise `python -m helpers.broker` would fail where another program has its port."""
    with plain_socket() as port:
        ports = impatient(checks.check_ports, port)
        assert ports[1:3] == (False, f"{port} is taken, and what listens there is no Kafka broker")
        command = shlex.split(ports.remedy)
        assert command[:-1] == [sys.executable, "-m", "helpers.broker", "--port"]
        assert checks.check_ports(int(command[-1])).ok


def test_a_port_that_a_broker_has_is_good(kafka):
    """Otherwise somebody whose broker runs already would be told to start another."""
    port = kafka.bootstrap_servers.split(":")[1]
    assert checks.check_ports(int(port))[1:] == (True, f"a Kafka broker answers at {port}", "")


WITHOUT_LOOPBACK = """
import subprocess
from helpers.checks import check_ports
ports = check_ports()
print(ports, subprocess.call(ports.remedy, shell=True), check_ports().ok, sep="\\n")
"""
UNSHARE = ["unshare", "--map-root-user", "--net"]


@pytest.mark.skipif(
    not (shutil.which("unshare") and shutil.which("ip"))
    or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="this user may not make a network of their own",
)
def test_a_machine_without_loopback_gets_it():
    """Otherwise neither the broker nor Spark would start, each with an error of its own."""
    run = subprocess.run(
        [*UNSHARE, sys.executable, "-c", WITHOUT_LOOPBACK],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )
    check, code, ok = run.stdout.splitlines()
    assert "no connection to 127.0.0.1 can be made: Network is unreachable" in check
    assert (code, ok) == ("0", "True")


def test_preflight_is_a_table_with_a_row_for_each_check(kafka):
    """Otherwise a notebook could not show it."""
    table = preflight(kafka.bootstrap_servers, memory="9000g")
    assert table.columns.tolist() == ["what", "ok", "found", "remedy"]
    assert table["what"].tolist() == [
        "Java", "Spark", "Kafka connector", "workers' Python", "Kafka broker", "memory", "disk",
        "ports",
    ]
    assert table.set_index("what")["ok"]["Kafka broker"]
    missing = table[~table["ok"]].set_index("what")
    assert missing["remedy"]["memory"] == "make run MEMORY=1g CORES=1"
    assert (missing["remedy"] != "").all()


def test_the_command_line_says_that_all_is_there():
    """Otherwise a script could not tell whether the run may start."""
    run = run_python("-m", "helpers.session", "--memory", "1g", "--cores", "1")
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    lines = run.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("ok       ") for line in lines)
    column = lines[1].index(pyspark.__version__)
    assert all(line[column - 1] == " " != line[column] for line in lines)


def test_the_command_line_without_java_says_how_to_get_it(installer):
    """Otherwise a newcomer's first sight would be a traceback."""
    installer("apt-get")
    run = run_python("-m", "helpers.session", "--memory", "1g")
    assert (run.returncode, run.stderr) == (1, "")
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["MISSING", "Java", "no", "java", "on", "PATH"]
    assert lines[1].strip() == f"mend it with: {own_rights(jars.INSTALL_JAVA['apt-get'])}"
    assert [line.split()[0] for line in lines[2:]] == ["ok"] * 7


def test_the_command_line_passes_on_what_it_is_told(kafka, capsys):
    """Otherwise it would check another run than the one that is meant."""
    arguments = ["--bootstrap-servers", kafka.bootstrap_servers]
    assert main([*arguments, "--memory", "9000g", "--cores", "2"]) == 1
    printed = capsys.readouterr().out
    assert f"answers at {kafka.bootstrap_servers}" in printed
    assert "9,002.0 GB needed" in printed


def test_a_session_does_not_import_what_only_the_checks_need():
    """Otherwise each import of the session, on each worker too, would take a second longer."""
    program = "import sys, helpers.session; print({'pandas', 'kafka', 'psutil'} & set(sys.modules))"
    assert run_python("-c", program).stdout == "set()\n"
