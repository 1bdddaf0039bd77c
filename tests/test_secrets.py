"""A secured Kafka from a notebook and from programs: no password or key shows anywhere."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from IPython.lib.pretty import pretty
from kafka import KafkaAdminClient
from processes import ROOT, run_python, running
from secret_search import SecretSearch

from helpers.broker import LocalKafka, python_settings
from helpers.kafka_settings import ClientSettings
from helpers.notebook import find_notebook, recorded
from helpers.streaming import spark_options

SECONDS = 900
EXAMPLES = ROOT / "examples"
FEW = {
    "1_walkthrough": ["EVENTS=4000", "SAMPLE_EVENTS=500"],
    "2_structured_streaming": ["EVENTS=4000", "RECORDS_PER_BATCH=1600"],
    "3_train_and_serve": ["EVENTS=2000", "EPOCHS=2"],
}


@dataclass
class Client:
    """A file with a client's settings, and the secrets in it."""

    file: Path
    secrets: list[str]


@pytest.fixture(scope="module")
def secure_kafka():
    """A secured broker."""
    with LocalKafka(security="SASL_SSL") as broker:
        yield broker


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    """An encrypted key with its certificate, as PEM on one line, and the password of the key."""
    folder = tmp_path_factory.mktemp("key")
    password = "swordfish-of-the-key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=reader", "-passout",
         "env:PASSWORD", "-keyout", folder / "key.pem", "-out", folder / "chain.pem"],
        env={**os.environ, "PASSWORD": password}, check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(  # with an encryption that Kafka's Java clients know
        ["openssl", "pkcs8", "-topk8", "-v1", "PBE-SHA1-3DES", "-in", folder / "key.pem", "-passin",
         "env:PASSWORD", "-passout", "env:PASSWORD", "-out", folder / "old.pem"],
        env={**os.environ, "PASSWORD": password}, check=True, capture_output=True,
    )  # fmt: skip
    one_line = [" ".join((folder / f"{part}.pem").read_text().split("\n")).strip()
                for part in ("old", "chain")]  # fmt: skip
    return *one_line, password


@pytest.fixture(scope="module")
def write_client(secure_kafka, key, tmp_path_factory):
    """Write the file of a user who may do all that the notebooks do, with a password and a key."""
    settings = secure_kafka.add_user("physicist")
    secure_kafka.allow("physicist", ["CREATE", "DESCRIBE", "READ", "WRITE"], topic="*")
    secure_kafka.allow("physicist", ["READ"], group="*")
    settings |= {
        "ssl.keystore.type": "PEM", "ssl.keystore.key": key[0],
        "ssl.keystore.certificate.chain": key[1], "ssl.key.password": key[2],
    }  # fmt: skip

    def write(password=""):
        jaas = settings["sasl.jaas.config"]
        real = re.search('password="([^"]+)"', jaas)[1]
        given = {**settings, "sasl.jaas.config": jaas.replace(real, password or real)}
        del given["bootstrap.servers"]
        file = tmp_path_factory.mktemp("client") / "client.properties"
        file.touch(mode=0o600)
        file.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
        return Client(file, [password or real, key[0].split()[5], key[2]])

    return write


@pytest.fixture
def search(tmp_path):
    """Run a program while searching for secrets; return its exit code, output and the search."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def run(command, secrets):
        environment = {**os.environ, "TMPDIR": str(temporary)}
        with (
            running([sys.executable, *command], env=environment) as process,
            SecretSearch(secrets, process.pid, temporary) as searched,
        ):
            printed, _ = process.communicate(timeout=SECONDS)
        searched.look_at(printed, "output")
        searched.look_into(tmp_path)
        return process.returncode, printed, searched

    return run


@pytest.fixture
def copied(tmp_path):
    """Copy a notebook, so that its outputs can be stored in it."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "notebooks").mkdir()

    def copy(name):
        target = tmp_path / "notebooks" / f"{name}.ipynb"
        target.write_bytes(find_notebook(name).read_bytes())
        return target

    return copy


@pytest.mark.long
@pytest.mark.parametrize("name", FEW)
def test_a_notebook_runs_on_a_secured_kafka_and_shows_no_secret(
    name, secure_kafka, write_client, copied, search, tmp_path
):
    """`KAFKA_CONFIG` is enough; no secret is in a cell, page, log, plan or command line."""
    client, path = write_client(), copied(name)
    command = ["-m", "helpers.notebook", str(path), "--store", "--html", str(tmp_path / "pages")]
    command += [f"BOOTSTRAP_SERVERS={secure_kafka.bootstrap_servers}", *FEW[name]]
    command += [f"KAFKA_CONFIG={client.file}", f"RESULTS={tmp_path / 'results'}"]
    code, printed, searched = search(command, client.secrets)
    assert code == 0, printed
    assert recorded(nbformat.read(path, as_version=4))["events"] > 0
    assert searched.log.exists() and (tmp_path / "pages" / f"{name}.html").exists()
    assert {"environment", "SQL", "SQL execution", "api environment"} <= searched.pages
    searched.look_at(secure_kafka.log_file.read_bytes(), "the broker's log")
    assert searched.found == set()


@pytest.mark.long
def test_a_notebook_with_a_wrong_password_names_the_reason_and_no_secret(
    secure_kafka, write_client, copied, search, tmp_path
):
    """The failed cell says what to check; the saved page repeats neither password nor key."""
    client, path = write_client("a-wrong-password"), copied("1_walkthrough")
    command = ["-m", "helpers.notebook", str(path), "--html", str(tmp_path / "pages")]
    command += [f"BOOTSTRAP_SERVERS={secure_kafka.bootstrap_servers}"]
    code, printed, searched = search([*command, f"KAFKA_CONFIG={client.file}"], client.secrets)
    assert code == 1
    assert "check sasl.mechanism, and user and password in sasl.jaas.config" in printed
    page = (tmp_path / "pages" / "1_walkthrough.failed.html").read_text()
    assert "check sasl.mechanism, and user and password in sasl.jaas.config" in page
    assert searched.found == set()


PROGRAMS = {
    "kafka_producer": ["examples/kafka_producer.py", "{servers}", "--events", "10"],
    "replay_dead_letters": ["examples/replay_dead_letters.py", "{servers}", "--topic", "t"],
    "dstream": [
        "examples/streaming_job.py", "--engine", "dstream", "--bootstrap-servers", "{servers}",
        "--topic", "t", "--output", "{folder}/output",
    ],
    "structured": [
        "examples/streaming_job.py", "--bootstrap-servers", "{servers}", "--topic", "t",
        "--output", "{folder}/output", "--checkpoint", "{folder}/checkpoint",
    ],
    "preflight": ["-m", "helpers.preflight", "--bootstrap-servers", "{servers}"],
}  # fmt: skip


LONGER = ("kafka_producer", "replay_dead_letters", "structured")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LONGER else ()) for name in PROGRAMS],
)
def test_a_program_with_a_wrong_password_names_the_reason_and_no_secret(
    name, secure_kafka, write_client, search, tmp_path
):
    """Each program exits with 1, says what to check, and repeats neither password nor key."""
    client = write_client("a-wrong-password")
    names = {"servers": secure_kafka.bootstrap_servers, "folder": tmp_path}
    command = [argument.format(**names) for argument in PROGRAMS[name]]
    for _ in range(10):
        arguments = [*command, "--kafka-config", str(client.file)]
        code, printed, searched = search(arguments, client.secrets)
        if "no Kafka broker answers" not in printed:  # on a busy machine, the answer is too late
            break
    assert code == 1, printed
    assert "check sasl.mechanism, and user and password in sasl.jaas.config" in printed
    assert "Traceback" not in printed
    assert searched.found == set()


def test_preflight_finds_a_secured_broker(secure_kafka, write_client):
    """The check connects with the same file as the run."""
    arguments = ["--bootstrap-servers", secure_kafka.bootstrap_servers]
    arguments += ["--kafka-config", str(write_client().file)]
    run = run_python("-m", "helpers.preflight", *arguments)
    assert f"answers at {secure_kafka.bootstrap_servers}" in run.stdout, run.stdout + run.stderr


@pytest.mark.long
def test_the_search_finds_a_secret_on_a_command_line_and_on_a_page_of_spark(tmp_path):
    """The search that the other tests rely on finds what it looks for."""
    program = (
        "import sys, time; from helpers.spark import get_spark;"
        "spark = get_spark(config={'spark.x': 'swordfish', 'spark.y.password': 'ang' + 'ler'});"
        "assert spark.conf.get('spark.y.password') == 'ang' + 'ler';"
        "spark.range(3).count(); time.sleep(8)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with (
        running([sys.executable, "-c", program, "an-argument"], env=environment) as process,
        SecretSearch(["swordfish"], process.pid, tmp_path) as searched,
        SecretSearch(["an-argument"], process.pid, tmp_path / "no log") as on_a_line,
        SecretSearch(["angler"], process.pid, tmp_path) as hidden,
    ):
        process.communicate(timeout=SECONDS)
    assert "api environment" in searched.found
    assert any(place.startswith("command line") for place in on_a_line.found)
    assert hidden.found == set() and process.returncode == 0


def test_settings_are_shown_without_secrets():
    """A reader who lets a cell show the settings doesn't store the password in the notebook."""
    settings = ClientSettings({"sasl.jaas.config": "swordfish", "sasl.mechanism": "PLAIN"})
    assert repr(settings) == "{'sasl.jaas.config': '***', 'sasl.mechanism': 'PLAIN'}"


def test_a_cell_that_ends_with_a_users_settings_shows_no_password(secure_kafka):
    """The settings of a new user are shown without the password, whatever client they are for."""
    settings = secure_kafka.add_user("reader")
    arguments = python_settings(settings)
    password = arguments["sasl_plain_password"]
    assert password in settings["sasl.jaas.config"]
    for shown in (settings, arguments, spark_options(settings), secure_kafka.settings):
        assert password not in pretty(shown) and "'***'" in pretty(shown)
    with KafkaAdminClient(**arguments) as admin:
        assert admin.list_topics() == []
