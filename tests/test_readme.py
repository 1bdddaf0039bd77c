"""The README: every command in it is one that works."""

import re
import shlex

import pytest
from processes import ROOT, dry_run_make, run_python

from helpers.higgs import generate_events

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_the_target_and_the_notebook_its_parameters(command):
    """Otherwise a newcomer's first command would fail."""
    commands = dry_run_make(*shlex.split(command)[1:])
    if "helpers.notebook" in commands:
        arguments = shlex.split(commands.split("helpers.notebook", 1)[1])
        check = (
            "import sys, nbformat; from helpers.notebook import *;"
            "set_parameters(nbformat.read(find_notebook(sys.argv[1]), as_version=4),"
            "dict(setting.split('=', 1) for setting in sys.argv[2:]))"
        )
        run = run_python("-c", check, *arguments)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "kafka_producer" in c])
def test_the_producers_commands_reach_the_broker(kafka, tmp_path, command):
    """Otherwise the second terminal would not work as written."""
    generate_events(10, seed=0).to_csv(tmp_path / "events.csv.gz", index=False)
    arguments = shlex.split(command)[1:]
    for index, argument in enumerate(arguments):
        if argument == "127.0.0.1:9092":
            arguments[index] = kafka.bootstrap_servers
        if argument.endswith(".csv.gz"):
            arguments[index] = str(tmp_path / "events.csv.gz")
    run = run_python(*arguments, "--topic", "readme")
    assert run.returncode == 0, run.stderr


def test_every_file_of_the_helpers_is_explained():
    """Otherwise a new part would not be found."""
    for path in (ROOT / "helpers").glob("[!_]*.py"):
        assert f"`helpers/{path.name}`" in README
