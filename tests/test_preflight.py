"""The preflight checks: each problem is real, and the proposed remedy fixes it."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest
from processes import ROOT, run_python, running

from helpers import preflight as checks
from helpers.broker import LOOPBACK, admin, free_port
from helpers.notebook import find_notebook, parameters
from helpers.preflight import main, preflight
from helpers.spark import jars

PROXY = "-D{0}.proxyHost=127.0.0.1 -D{0}.proxyPort=9"
UNREACHABLE = f"{PROXY.format('http')} {PROXY.format('https')}"
PYSPARK = Path(pyspark.__file__).parent
JAVA = os.path.realpath(shutil.which("java"))
SH, LN = shutil.which("sh"), shutil.which("ln")
MODULES = "numpy, pandas, pyarrow, orjson, msgspec, keras, tensorflow"


@pytest.fixture
def apply(monkeypatch):
    """Run a remedy in a shell, and adopt its changes to the environment."""

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
    """An empty folder as the whole PATH, without JAVA_HOME."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    return folder


@pytest.fixture
def installer(tools):
    """Put a package manager on PATH that installs this machine's Java."""

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
    """Run a check with a time-out of one second."""

    def check(function, *arguments):
        with monkeypatch.context() as patch:
            for module in (checks, admin):
                patch.setattr(module, "ANSWER_SECONDS", 1)
            return function(*arguments)

    return check


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The Python of an empty virtual environment, without pip."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run = run_python("-m", "venv", "--without-pip", str(folder))
    assert run.returncode == 0, run.stderr
    return str(folder / "bin" / "python")


@pytest.fixture
def check_in(bare_python, tmp_path, monkeypatch):
    """Run a check in an environment with all packages, but without jars or the installed kit."""
    packages = tmp_path / "packages"
    for entry in PYSPARK.parent.iterdir():
        if "kafka_spark_keras" not in entry.name:
            link(entry, packages / entry.name)
    monkeypatch.setenv("PYTHONPATH", str(packages))

    def check(call, without=()):
        for package in without:
            (packages / package).unlink()
        return ask(bare_python, call)

    yield check
    shutil.rmtree(Path(bare_python).parent.parent / "share", ignore_errors=True)


def ask(python, call):
    """Run a check in another process."""
    run = subprocess.run(
        [python, "-c", f"import json; from {checks.__name__} import *; print(json.dumps({call}))"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return checks.Check(*json.loads(run.stdout))


def link(target, path):
    """Make a symbolic link, and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def program(folder, name, text, interpreter=SH):
    """Write an executable script, and return its path."""
    path = folder / name
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def own_rights(command):
    """Return a command as it is shown to this user: without sudo for root."""
    return command.replace("sudo ", "") if os.geteuid() == 0 else command


def sites_spark(folder, version):
    """Make a Spark home that claims another version, but is PySpark's Spark."""
    link(PYSPARK / "bin", folder / "bin")
    for jar in (PYSPARK / "jars").iterdir():
        name = f"spark-core_2.13-{version}.jar" if jar.name.startswith("spark-core_") else jar.name
        link(jar, folder / "jars" / name)
    return str(folder)


def repository(folder, pattern):
    """Write a Spark configuration that resolves from a local repository, as some sites do."""
    settings = folder / "ivysettings.xml"
    settings.write_text(
        '<ivysettings><settings defaultResolver="site"/><resolvers><filesystem name="site">'
        f'<artifact pattern="{pattern}"/></filesystem></resolvers></ivysettings>'
    )
    (folder / "spark-defaults.conf").write_text(f"spark.jars.ivySettings {settings}\n")
    return str(folder)


@contextlib.contextmanager
def plain_socket():
    """Occupy a port with a listener that is not a Kafka broker."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_wrong_java_home_is_unset(monkeypatch, apply):
    """The remedy for a wrong JAVA_HOME is to unset it, so that PATH's Java is used."""
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    java = checks.check_java()
    found = "JAVA_HOME is /nowhere, which has no bin/java"
    assert java[1:] == (False, found, "unset JAVA_HOME")
    apply(java.remedy)
    assert checks.check_java().ok


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "brew"])
def test_without_java_the_command_of_this_system_installs_it(installer, apply, manager):
    """Without Java, the remedy is the install command of this system's package manager."""
    installer(manager)
    java = checks.check_java()
    assert not java.ok
    assert java.remedy == own_rights(jars.INSTALL_JAVA[manager])
    apply(java.remedy)
    assert checks.check_java().ok


def test_without_a_known_package_manager_java_is_still_asked_for(tools):
    """Without a known package manager, the remedy still asks for Java 17 or 21."""
    assert checks.check_java()[1:] == (
        False, "no java on PATH", "install Java 17 or 21, and put it on PATH"
    )


@pytest.mark.parametrize(
    "says, found",
    [
        ("""echo 'openjdk version "11.0.2" 2019-01-15' >&2""", "11.0.2, but 17 or newer is needed"),
        ("""echo 'java version "1.8.0_392"' >&2""", "1.8.0_392, but 17 or newer is needed"),
        ("echo 'Unable to locate a Java Runtime.' >&2; exit 1", "no version, but 17"),
    ],
)
def test_an_old_java_is_replaced(tools, installer, apply, says, found):
    """The remedy for an old or broken Java installs a new one."""
    installer("apt-get")
    program(tools, "java", says)
    java = checks.check_java()
    assert not java.ok
    assert found in java.found
    apply(java.remedy)
    assert checks.check_java().ok


def test_an_old_java_of_java_home_gives_way_to_a_new_one_on_path(monkeypatch, tmp_path, apply):
    """If JAVA_HOME has an old Java and PATH a new one, JAVA_HOME is to be unset."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "java", """echo 'openjdk version "11.0.2" 2019-01-15' >&2""")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    java = checks.check_java()
    assert (java.ok, java.remedy) == (False, "unset JAVA_HOME")
    apply(java.remedy)
    assert checks.check_java().ok


def test_a_spark_home_without_spark_is_unset(monkeypatch, tmp_path, apply):
    """The remedy for a SPARK_HOME without Spark is to unset it."""
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    spark, connector = checks.check_spark(), checks.check_connector()
    assert (spark.ok, spark.remedy) == (connector.ok, connector.remedy) == (
        False, "unset SPARK_HOME"
    )
    apply(spark.remedy)
    assert checks.check_spark().ok
    assert checks.check_connector().ok


@pytest.mark.parametrize(
    "version, found, remedy",
    [
        ("2.4.8", "or newer is needed", "or newer of your site"),
        ("4.99.0", "the same for both", " -m pip install 'pyspark~=4.99.0'"),
    ],
)
def test_a_sites_spark_of_another_version_is_kept(monkeypatch, tmp_path, version, found, remedy):
    """The remedy for a site's Spark that doesn't match PySpark leaves the site's Spark in use."""
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path, version))
    spark = checks.check_spark()
    assert f"Spark {version} in {tmp_path} and PySpark {pyspark.__version__}, but" in spark.found
    assert not spark.ok and found in spark.found
    assert spark.remedy.endswith(remedy)


def test_a_pyspark_that_was_imported_before_the_sites_is_named(monkeypatch, tmp_path):
    """If the site's Spark has a PySpark, the remedy is to import it instead of another one."""
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path, "4.99.0"))
    (tmp_path / "python" / "pyspark").mkdir(parents=True)
    assert checks.check_spark().remedy == "restart Python, and import helpers before pyspark"


def test_a_sites_spark_of_the_same_version_is_good(monkeypatch, tmp_path):
    """A site's Spark of PySpark's version passes the check."""
    version = f"{pyspark.__version__}-site1"
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path, version))
    assert checks.check_spark()[1:] == (True, f"{version}, {tmp_path}", "")


@pytest.mark.long
def test_another_pyspark_is_replaced_by_the_pinned_one(monkeypatch, tmp_path, apply):
    """The remedy for another PySpark version installs the pinned one."""
    for entry in PYSPARK.iterdir():
        if entry.name != "version.py":
            link(entry, tmp_path / "pyspark" / entry.name)
    (tmp_path / "pyspark" / "version.py").write_text('__version__ = "4.1.9"\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spark = ask(sys.executable, "check_spark()")
    pinned = f"pyspark=={pyspark.__version__}"
    assert spark[1:3] == (False, f"PySpark 4.1.9, but {pinned} is needed")
    assert spark.remedy == shlex.join([sys.executable, "-m", "pip", "install", pinned])
    # The pinned version is installed already, behind the other, so pip needs no network.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    apply(spark.remedy)
    monkeypatch.delenv("PYTHONPATH")
    assert ask(sys.executable, "check_spark()").ok


def test_the_pinned_version_is_known_without_an_installation(check_in):
    """The pinned version is known in a clone that isn't installed."""
    assert check_in("check_spark()").ok


@pytest.mark.long
def test_jars_that_cannot_be_fetched_are_when_the_network_is_back(
    monkeypatch, tmp_path, check_in, apply
):
    """Without network, the remedy fetches the jars once the network is available."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", UNREACHABLE)
    connector, broker = check_in("check_connector()"), check_in("check_broker()")
    for check in (connector, broker):
        assert not check.ok
        assert "Maven Central can't be reached" in check.found
        assert check.remedy.endswith("# once the network is available")
    assert connector.remedy == broker.remedy
    # In place of the network: a repository of this environment's jars.
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
    """If Java is missing as well, the remedy for missing jars is to install Java."""
    installer("dnf")
    connector = check_in("check_connector()")
    assert not connector.ok
    assert connector.remedy == own_rights(jars.INSTALL_JAVA["dnf"])


def test_the_connector_of_a_sites_spark_is_to_be_named(monkeypatch, tmp_path):
    """If Maven Central has no connector for a site's Spark, the remedy names the site's jars."""
    version = f"{pyspark.__version__}-site1"
    monkeypatch.setenv("SPARK_HOME", sites_spark(tmp_path / "spark", version))
    monkeypatch.setenv("SPARK_CONF_DIR", repository(tmp_path, f"{tmp_path}/[artifact].jar"))
    connector = checks.check_connector()
    assert f"has no org.apache.spark:spark-sql-kafka-0-10_2.13:{version}" in connector.found
    export, setting = shlex.split(connector.remedy)
    name, _, value = setting.partition("=")
    assert (connector.ok, export) == (False, "export")
    monkeypatch.setenv(name, value)
    assert checks.check_connector()[1:] == (True, "named in PYSPARK_SUBMIT_ARGS", "")


def test_missing_modules_of_the_workers_are_named_before_the_run(check_in):
    """Modules that workers can't import are named; the remedy installs the requirements."""
    workers = check_in("check_worker_python()", without=["orjson", "keras"])
    assert not workers.ok
    assert workers.found.endswith("can't import orjson, keras")
    python, *install = shlex.split(workers.remedy)
    assert workers.found.startswith(python)
    assert install == ["-m", "pip", "install", "-r", str(ROOT / "requirements.txt")]


ON_A_CLUSTER = """
import json, os, sys, threading, time
from pyspark import SparkConf, SparkContext
from helpers import preflight as checks
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
checks.WORKERS_SECONDS = 2
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


@pytest.mark.long
def test_the_executors_of_a_cluster_are_asked(monkeypatch, tmp_path, bare_python):
    """On a cluster, the executors' Python is checked, not the driver's."""
    for part in ("bin", "jars", "python"):
        link(PYSPARK / part, tmp_path / "spark" / part)
    arguments = [bare_python, str(tmp_path / "spark"), str(tmp_path / "marker")]
    run = run_python("-c", ON_A_CLUSTER, *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    found = {name: checks.Check(*check) for name, check in json.loads(run.stdout).items()}
    assert found["bare"].found == f"{bare_python} can't import {MODULES}"
    assert found["this"].ok
    assert found["this"].found.endswith(sys.executable)
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for name, seconds in (("nowhere", 60), ("busy", 2)):
        answer = f"answers within {seconds} s as Python {own}"
        assert found[name].found == f"no worker of local-cluster[1,1,512] {answer}"
    for name in ("bare", "nowhere", "busy"):
        assert found[name].remedy.startswith(f"set PYSPARK_PYTHON to a Python {own} with the pack")
        assert not found[name].ok


def test_a_broker_that_answers_is_found(kafka):
    """A broker that answers passes the check."""
    assert checks.check_broker(kafka.bootstrap_servers)[1:] == (
        True, f"answers at {kafka.bootstrap_servers}", ""
    )


def test_a_missing_broker_is_started(impatient):
    """The remedy for a missing local broker starts one at the same address."""
    address = f"{LOOPBACK}:{free_port()}"
    broker = impatient(checks.check_broker, address)
    assert broker[1:3] == (False, f"no Kafka broker answers at {address} within 1 s")
    command = shlex.split(broker.remedy)
    assert command[:-1] == [sys.executable, "-m", "helpers.broker", "--port"]
    with running(command) as process:
        assert process.stdout.readline() == f"ready at {address}; Ctrl-C stops it\n"
        assert checks.check_broker(address).ok


def test_a_broker_elsewhere_is_to_be_looked_after(impatient):
    """For a broker on another host, the remedy is to check it and its address."""
    broker = impatient(checks.check_broker, "no.such.host.invalid:9092")
    assert not broker.ok
    assert broker.remedy.startswith("check the address, that the broker is running")


@pytest.mark.parametrize("malformed", ["127.0.0.1", "kafka:http", ":9093", "9093", "one:9093,two"])
def test_a_malformed_address_is_named(malformed):
    """A malformed address is refused with an example of a valid one."""
    broker = checks.check_broker(malformed)
    assert not broker.ok
    assert "is not the address of a Kafka broker: write host:port." in broker.found
    assert broker.remedy == "write it like 127.0.0.1:9092"


def test_too_much_memory_is_made_less():
    """The remedy for too little memory is a `make run` command that fits."""
    memory = checks.check_memory("9000g", cores=2)
    assert not memory.ok
    assert "9,002.0 GB needed" in memory.found
    make, run, *settings = shlex.split(memory.remedy, comments=True)
    values = dict(setting.split("=") for setting in settings)
    assert (make, run) == ("make", "run")
    known = parameters(find_notebook("1_walkthrough"))
    assert {name.lower() for name in values} <= known.keys()
    assert checks.check_memory(values["MEMORY"], int(values["CORES"])).ok


def test_more_cores_need_more_memory():
    """Each additional core adds to the memory that is needed."""
    assert "9,003.2 GB needed" in checks.check_memory("9000g", cores=4).found


@pytest.mark.parametrize("malformed", ["2", "g", "2 gigabytes", ""])
def test_what_is_no_amount_of_memory_is_corrected(malformed):
    """An invalid amount of memory is refused, and the remedy has a valid one."""
    memory = checks.check_memory(malformed)
    assert not memory.ok
    assert checks.check_memory(shlex.split(memory.remedy)[-1]).ok


@pytest.mark.parametrize(
    "folder, found",
    [
        ("/proc", "0.0 GB free in /proc, 1.0 GB needed"),
        ("/no/such/folder", "/no/such/folder can't be used: No such file or directory"),
        ("/etc/passwd", "/etc/passwd can't be used: Not a directory"),
    ],
)
def test_a_temporary_folder_without_space_is_replaced(monkeypatch, apply, folder, found):
    """The remedy for a full or unusable temporary folder sets TMPDIR to one with space."""
    monkeypatch.setenv("TMPDIR", folder)
    disk = checks.check_disk()
    assert disk[1:3] == (False, found)
    assert disk.remedy.startswith("export TMPDIR=/")
    apply(disk.remedy)
    assert checks.check_disk().ok


def test_a_port_that_something_else_has_is_replaced(impatient):
    """If another program has the port, the remedy starts the broker on a free one."""
    with plain_socket() as port:
        ports = impatient(checks.check_ports, port)
        assert ports[1:3] == (False, f"{port} is taken by a program that is not a Kafka broker")
        command = shlex.split(ports.remedy)
        assert command[:-1] == [sys.executable, "-m", "helpers.broker", "--port"]
        assert checks.check_ports(int(command[-1])).ok


def test_a_port_that_a_broker_has_is_good(kafka):
    """A port at which a Kafka broker answers passes the check."""
    port = kafka.bootstrap_servers.split(":")[1]
    assert checks.check_ports(int(port))[1:] == (True, f"a Kafka broker answers at {port}", "")


def test_preflight_is_a_table_with_a_row_for_each_check(kafka):
    """The result is a table with a row per check, and a remedy for each failed one."""
    table = preflight(kafka.bootstrap_servers, memory="9000g")
    assert table.columns.tolist() == ["what", "ok", "found", "remedy"]
    assert table["what"].tolist() == [
        "Java", "Spark", "Kafka connector", "workers' Python", "Kafka broker", "memory", "disk",
        "ports",
    ]
    assert table.set_index("what")["ok"]["Kafka broker"]
    missing = table[~table["ok"]].set_index("what")
    assert missing["remedy"]["memory"] == "make run MEMORY=1g CORES=1  # needs 3 GB"
    assert (missing["remedy"] != "").all()


def test_the_command_line_says_that_all_is_there():
    """If nothing is missing, the command prints one line per check and exits with 0."""
    run = run_python("-m", "helpers.preflight", "--memory", "1g", "--cores", "1")
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    lines = run.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("ok       ") for line in lines)
    column = lines[1].index(pyspark.__version__)
    assert all(line[column - 1] == " " != line[column] for line in lines)


def test_the_command_line_without_java_says_how_to_get_it(installer):
    """Without Java, the command prints how to install it and exits with 1."""
    installer("apt-get")
    run = run_python("-m", "helpers.preflight", "--memory", "1g")
    assert (run.returncode, run.stderr) == (1, "")
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["MISSING", "Java", "no", "java", "on", "PATH"]
    assert lines[1].strip() == f"fix it with: {own_rights(jars.INSTALL_JAVA['apt-get'])}"
    assert [line.split()[0] for line in lines[2:]] == ["ok"] * 7


def test_the_command_line_passes_on_what_it_is_told(kafka, capsys):
    """The command passes its options on to the checks."""
    arguments = ["--bootstrap-servers", kafka.bootstrap_servers]
    assert main([*arguments, "--memory", "9000g", "--cores", "2"]) == 1
    printed = capsys.readouterr().out
    assert f"answers at {kafka.bootstrap_servers}" in printed
    assert "9,002.0 GB needed" in printed


def test_a_session_does_not_import_what_only_the_checks_need():
    """Importing `helpers.spark` loads none of the checks' modules, which take a second."""
    program = "import sys, helpers.spark; print({'pandas', 'kafka', 'psutil'} & set(sys.modules))"
    assert run_python("-c", program).stdout == "set()\n"
