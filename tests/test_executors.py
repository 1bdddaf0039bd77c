"""What a driver sends to its executors, on a cluster with one worker; `make test-cluster` has more.

The docs' cells for clusters are checked as well.
"""

import os
import re
import sys
import sysconfig

import pytest
from processes import ROOT, dry_run_make, run_python
from standalone import standalone

from helpers.notebook import find_notebook, parameters
from helpers.preflight import WORKERS_IMPORT

# Without the module `site`, Python ignores installed links to this repository.
PYTHON = """#!/bin/sh
PYTHONPATH="$PYTHONPATH:{packages}" exec {python} -S "$@"
"""

LOOK = """
import sys
from helpers.spark import get_spark

def look(_):
    import helpers.records
    event = helpers.records.json_to_dataframe_row
    yield helpers.__file__, event.__module__

config = {"spark.driver.host": "127.0.0.1", "spark.ui.enabled": "false"}
spark = get_spark(master=sys.argv[1], executors=1, memory="512m", config=config)
print(*spark.sparkContext.parallelize([1], 1).mapPartitions(look).first())
spark.stop()
"""

CLUSTERS = (ROOT / "docs" / "clusters.md").read_text()
CELLS = re.findall(r"```python\n(.*?)```", CLUSTERS, re.DOTALL)


def test_executors_get_the_kit_from_the_driver(tmp_path):
    """An executor that can't find `helpers` on its own imports the driver's."""
    python = tmp_path / "python"
    packages = sysconfig.get_paths()["purelib"]
    python.write_text(PYTHON.format(python=sys.executable, packages=packages))
    python.chmod(0o755)
    environment = {**os.environ, "PYSPARK_PYTHON": str(python), "SPARK_LOCAL_IP": "127.0.0.1"}
    with standalone(tmp_path) as address:
        run = run_python("-c", LOOK, address, env=environment, seconds=200)
    assert run.returncode == 0, run.stderr[-3000:]
    file, module = run.stdout.split()
    assert file.endswith("helpers.zip/helpers/__init__.py")
    assert module == "helpers.records"


def test_the_packed_environment_has_what_workers_import():
    """`make pack` installs what the check before a run looks for, and what unpacks any file."""
    (names,) = re.findall(r"grep -E '\^\((.*)\)=='", dry_run_make("pack"))
    for module in (*WORKERS_IMPORT, "zstandard"):
        assert re.fullmatch(names, module)
        assert re.search(rf"^{module}(-cpu)?==", (ROOT / "requirements.txt").read_text(), re.M)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_of_the_docs_sets_parameters_of_every_notebook(cell, monkeypatch):
    """The cells for clusters run, and set only names that the notebooks have as parameters."""
    for name in ("HADOOP_CONF_DIR", "PYSPARK_PYTHON", "PYSPARK_SUBMIT_ARGS"):
        monkeypatch.setenv(name, "")  # restored afterwards
    names = {}
    exec(cell, names)
    names = names.keys() - {"os", "__builtins__"}
    for notebook in ("1_walkthrough", "2_structured_streaming", "3_train_and_serve"):
        assert names <= parameters(find_notebook(notebook)).keys()
