"""The README and docs/: commands and the example work, and messages, names and links are real."""

import json
import os
import pkgutil
import re
import shlex
import socket
import sys
import urllib.request
from datetime import UTC, datetime, timedelta

import keras
import numpy as np
import pandas as pd
import pytest
from processes import (
    ROOT,
    beyond_loopback,
    dry_run_make,
    run_python,
    running,
    wait_until,
    watched,
    without_make,
)
from py4j.protocol import Py4JJavaError
from pyspark.errors.error_classes import ERROR_CLASSES_MAP

from helpers.broker import free_port
from helpers.higgs import generate_events
from helpers.notebook import find_notebook, parameter_values

README = (ROOT / "README.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
PYTHON = ".venv/bin/python "


def commands(start):
    """Return the README's commands that start with a prefix."""
    return [command for command in COMMANDS if command.startswith(start)]


def test_every_command_is_one_that_is_tested_here():
    """Every command in the README is of a kind that a test in this file runs."""
    tried = ("make", f"{PYTHON}-m helpers.broker", f"{PYTHON}-m helpers.preflight")
    tried += (f"{PYTHON}examples/kafka_producer.py", f"{PYTHON}score_pumps.py")
    tried += (f"{PYTHON}examples/streaming_job.py", f"{PYTHON}examples/replay_dead_letters.py")
    assert [command for command in COMMANDS if not command.startswith(tried)] == []


@pytest.mark.parametrize("command", commands("make"))
def test_make_knows_the_target_and_the_notebook_its_parameters(command):
    """Every `make` command has a target, and its notebook has the given parameters."""
    recipe = dry_run_make(*shlex.split(command)[1:])
    if "helpers.notebook" in recipe:
        name, *given = shlex.split(recipe.split("helpers.notebook", 1)[1])
        parameter_values(find_notebook(name), dict(each.split("=", 1) for each in given))


@pytest.mark.long  # in `make test`, the notebook runs cell by cell
def test_make_run_ends_with_the_totals_and_listens_on_loopback_only():
    """`make run` ends with a line of totals; no other machine can reach its processes."""
    (command,) = commands("make run EVENTS=20000")
    with watched(shlex.split(command), env=without_make()) as (process, seen):
        printed, _ = process.communicate(timeout=1_800)
    assert process.returncode == 0, printed
    totals = r"walkthrough: events=20000 signal=\d+ batches=\d+"
    assert re.fullmatch(totals, printed.splitlines()[-1])
    assert len(seen) >= 8 and beyond_loopback(seen) == []


def test_make_lab_opens_the_notebooks():
    """`make lab` opens the folder of the notebooks, and serves the pages to which they link."""
    (command,) = commands("make lab")
    with running(shlex.split(command), env={**without_make(), "BROWSER": "true"}) as process:
        lines = iter(process.stdout.readline, "")
        address = next(found for line in lines if (found := re.search(r"http://127\S+", line)))[0]
        server, token = address.split("/lab/tree/notebooks?")
        names = wait_until(lambda: names_at(f"{server}/api/contents/notebooks?{token}"))
        linked = wait_until(lambda: names_at(f"{server}/api/contents/docs?{token}"))
    assert "1_walkthrough.ipynb" in names and "glossary.md" in linked


def names_at(address):
    """Return the files that a Jupyter server lists, or none if it doesn't answer yet."""
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return [entry["name"] for entry in json.load(answer)["content"]]
    except OSError:  # urllib's errors are such
        return []


@pytest.mark.parametrize("command", commands(f"{PYTHON}-m helpers.broker"))
def test_the_brokers_command_starts_one(command):
    """The broker command starts a broker at the given port."""
    port = free_port()
    arguments = shlex.split(command.replace("9092", str(port)))[1:]
    with running([sys.executable, *arguments]) as process:
        assert f"127.0.0.1:{port}" in process.stdout.readline()
        socket.create_connection(("127.0.0.1", port), timeout=10).close()


@pytest.mark.parametrize("command", commands(f"{PYTHON}examples/kafka_producer.py"))
def test_the_producers_commands_reach_the_broker(kafka, tmp_path, command):
    """The producer commands send events to the broker."""
    generate_events(10, seed=0).to_csv(tmp_path / "events.csv.gz", index=False)
    arguments = shlex.split(command)[1:]
    for index, argument in enumerate(arguments):
        if argument == "127.0.0.1:9092":
            arguments[index] = kafka.bootstrap_servers
        if argument.endswith(".csv.gz"):
            arguments[index] = str(tmp_path / "events.csv.gz")
        if argument == "200000":
            arguments[index] = "2000"
    run = run_python(*arguments, "--topic", "readme")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", commands(f"{PYTHON}examples/streaming_job.py"))
def test_the_jobs_commands_have_its_options(command, example):
    """The streaming job accepts the README's options; test_streaming_job.py runs it."""
    options = example("streaming_job").parse_arguments(shlex.split(command)[2:])
    assert options.bootstrap_servers


def test_the_replay_command_repairs_as_written(kafka, topic, produce, tmp_path):
    """The replay command works as written; test_replay.py has the details."""
    (command,) = commands(f"{PYTHON}examples/replay_dead_letters.py")
    (tmp_path / "repairs.py").write_text("def repair(value):\n    return value\n")
    arguments = [
        {"127.0.0.1:9092": kafka.bootstrap_servers, "Machine_Learning": topic}.get(word, word)
        for word in shlex.split(command)[2:]
    ]
    program = str(ROOT / "examples" / "replay_dead_letters.py")
    run = run_python(program, *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", commands(f"{PYTHON}-m helpers.preflight"))
def test_the_check_before_a_run_finds_all_there(command):
    """The preflight command finds nothing missing, except perhaps memory and ports."""
    run = run_python(*shlex.split(command)[1:])
    # Free memory and ports depend on other tests and programs.
    missing = re.findall(r"^MISSING +(\w+)", run.stdout, re.MULTILINE)
    assert set(missing) <= {"memory", "ports"}, run.stdout + run.stderr
    assert run.returncode == bool(missing)


def test_the_worked_example_scores_its_own_topic(kafka, produce, tmp_path):
    """The example scores another topic, schema and model, shows when, and keeps the bad record."""
    readings = pd.DataFrame({
        "reading": range(500),
        "temperature": np.linspace(20, 90, 500),
        "pressure": np.linspace(1, 4, 500),
        "valves_open": np.arange(500) % 5,
    })  # fmt: skip
    values = [json.dumps(reading).encode() for reading in readings.to_dict("records")]
    produce("pumps", [*values, b'{"reading": 500}'])
    features = readings.drop(columns="reading").to_numpy("float32")
    scaling = keras.layers.Normalization()
    scaling.adapt(features)
    layers = [keras.Input((3,)), scaling, keras.layers.Dense(2, "softmax")]
    model = keras.Sequential(layers)
    model.save(tmp_path / "pumps.keras")
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(program.splitlines()) < 25
    (command,) = commands(f"{PYTHON}score_pumps.py")
    path = tmp_path / command.removeprefix(PYTHON)
    path.write_text(program.replace("127.0.0.1:9092", kafka.bootstrap_servers))

    began = datetime.now(UTC)
    run = run_python(str(path), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    scored = pd.read_parquet(tmp_path / "pumps-scored" / "data").sort_values("reading")
    bad = scored[scored["bad"].notna()]["bad"]
    assert [record["reason"] for record in bad] == ["temperature is missing"]
    scored = scored[scored["bad"].isna()]
    assert scored["reading"].tolist() == readings["reading"].tolist()
    streamed = scored[["probability_0", "probability_1"]].to_numpy()
    np.testing.assert_allclose(streamed, model.predict(features, verbose=0), atol=1e-5)
    signal = int((streamed[:, 1] > 0.5).sum())
    assert f"'events': 500, 'signal': {signal}, 'bad': 1" in run.stdout
    times = re.findall(r"^\d\d:\d\d:\d\d", run.stdout, re.MULTILINE)
    seconds = (began + timedelta(seconds=number) for number in range(1_200))
    assert times and set(times) <= {f"{second:%H:%M:%S}" for second in seconds}


def symptoms():
    """Return the messages in the tables on troubleshooting."""
    rows = TROUBLESHOOTING.splitlines()
    return [text for row in rows for text in re.findall("`([^`]+)`", cell_one(row))]


def cell_one(row):
    """Return the first cell of a table row."""
    return row.split("|")[1] if row.startswith("|") else ""


NOT_OURS = {
    "MemoryError", "UNNAMED_STREAMING_SOURCES",
    "No module named 'pyspark.streaming.kafka'", "Failed to find data source: kafka",
    "PYTHON_VERSION_MISMATCH", "ModuleNotFoundError", "java.lang.OutOfMemoryError",
    "Python worker exited unexpectedly", "EventId is missing",
}  # fmt: skip


def test_the_symptoms_are_worded_as_the_kit_words_them():
    """The kit's messages on the page about troubleshooting are worded as in the code."""
    sources = [*(ROOT / "helpers").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    sources += [ROOT / "setup.sh"]
    # Messages contain values, and long ones span several lines of code.
    text = re.sub(r'"\n\s+f?"', "", "\n".join(path.read_text() for path in sources))
    text = re.sub(r"\{[^}\n]*\}", "*", text)
    for symptom in set(symptoms()) - NOT_OURS:
        parts = [re.escape(part) for part in re.split(r"'?\.\.\.'?|\b\d{4}\b|\b60\b", symptom)]
        assert re.search(r"[^\n]*".join(parts), text), symptom


@pytest.mark.long
def test_pyspark_and_spark_still_word_theirs_so():
    """The messages of PySpark and Spark on that page are worded as in this version."""
    run = run_python("-c", "import pyspark.streaming.kafka")
    assert "No module named 'pyspark.streaming.kafka'" in run.stderr
    read = "SparkSession.builder.master('local[1]').getOrCreate().read.format('kafka').load()"
    run = run_python(
        "-c", f"from pyspark.sql import SparkSession; {read}",
        env={**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"},
    )
    assert "Failed to find data source: kafka" in run.stderr
    assert "PYTHON_VERSION_MISMATCH" in ERROR_CLASSES_MAP


@pytest.mark.long
def test_spark_still_words_a_killed_worker_so(spark):
    """Spark's message for a killed Python worker is worded as on that page."""
    with pytest.raises(Py4JJavaError, match="Python worker exited unexpectedly"):
        spark.sparkContext.parallelize([1], 1).foreach(lambda _: os.kill(os.getpid(), 9))


def test_every_room_of_the_helpers_is_explained():
    """Every room of `helpers` is listed in the README and in the package's table."""
    table = (ROOT / "helpers" / "__init__.py").read_text()
    rooms = [file.parent for file in (ROOT / "helpers").glob("*/__init__.py")]
    for path in [*rooms, *(ROOT / "helpers").glob("[!_]*.py")]:
        assert f"`helpers/{path.name}{'/' if path.is_dir() else ''}`" in README
        assert f"| `{path.stem}` |" in table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_name_on_a_page_exists(page):
    """Links within the repository, files of the kit and names in `helpers` lead somewhere."""
    text = page.read_text()
    for link, section in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not section or section in sections(target.read_text()), section
    for path in re.findall(r"`((?:helpers|examples|docs|notebooks|tests)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"\bhelpers(?!\.zip)(?:\.\w+)+", text):
        pkgutil.resolve_name(name)


def sections(text):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings}
