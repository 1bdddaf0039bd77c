# run    executes a notebook, by default the walkthrough; set its parameters in capitals:
#        make run EVENTS=20000        make run NOTEBOOK=1_walkthrough BOOTSTRAP_SERVERS=host:9092
# test   runs all tests, including the notebooks, in up to three processes: as many as the free
#        memory allows, at 2.5 GB each; make test WORKERS=1 sets the number
# test-long  runs the tests that take longest, such as those that repeat crashes, in three hours
# test-cluster  runs notebooks and jobs on a real YARN with HDFS, on a standalone cluster and on older
#        versions of Spark, in this machine, which takes 25 minutes and 10 GB of memory; if the
#        headers of Kerberos are installed (libkrb5-dev), also kafka-python's part of it
# test-hub   runs the walkthrough as two users of a JupyterHub, and as a user of CERN SWAN; it needs
#        npm, and installs the packages of requirements-hub.txt and tests/requirements-swan.txt
# pack   packs the Python packages and `helpers` for a cluster's machines: see docs/clusters.md
# bench  measures the walkthrough's stream beside other programs, and the processor's limit
# lab    opens the notebooks in JupyterLab
# notebooks   executes all notebooks and stores their outputs in them
# clean  removes everything that the other targets created
# The first target that runs installs everything: see setup.sh.

NOTEBOOK = 1_walkthrough
WORKERS = auto

# The notebook's parameters: the variables on the command line, except those for make itself.
typed = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
quoted = '$(subst ','\'',$(1))'
parameters = $(foreach name,$(filter-out NOTEBOOK PYTHON,$(typed)),$(call quoted,$(name)=$(value $(name))))

# What Spark's workers import, as in helpers/preflight.py, and zstandard for some files.
packed = numpy|pandas|pyarrow|orjson|msgspec|keras|tensorflow(-cpu)?|zstandard

.PHONY: run test test-long test-cluster test-hub pack bench lab notebooks clean setup

run: setup
	@.venv/bin/python -m helpers.notebook $(call quoted,$(NOTEBOOK)) $(parameters)

test: setup
	@.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: setup
	@.venv/bin/python -m pytest -m long -s

test-cluster: setup
	@for version in 3.5.7 4.0.0 4.1.1; do \
		./setup.sh --target .venv/spark-$$version --no-deps pyspark==$$version || exit 1; \
	done
	@! command -v krb5-config > /dev/null || ./setup.sh gssapi==1.12.0
	@.venv/bin/python -m pytest -m cluster -s

# Without Spark, which a cluster has, and without `helpers`, which a driver sends to its executors.
pack: setup
	@mkdir -p build
	@.venv/bin/uv pip freeze --quiet --python .venv --exclude-editable > build/versions.txt
	@.venv/bin/uv venv --quiet --clear --python .venv/bin/python build/environment
	@grep -E '^($(packed))==' requirements.txt | ./setup.sh \
		--compile-bytecode --python build/environment --constraint build/versions.txt -r -
	@tar -cf - -C build/environment --exclude='*/tensorflow/include' --exclude='*/pandas/tests' . \
		| gzip -1 > build/environment.tar.gz
	@.venv/bin/python -m zipfile -c build/helpers.zip helpers
	@rm -r build/environment build/versions.txt
	@ls -sh build/environment.tar.gz build/helpers.zip

test-hub: setup
	@./setup.sh -r requirements-hub.txt
	@./setup.sh --target .venv/swan --no-deps -r tests/requirements-swan.txt
	@npm install --silent --no-fund --no-audit --prefix .venv configurable-http-proxy@5.3.0
	@.venv/bin/python -m pytest -m hub -s tests

bench: setup
	@./setup.sh -r requirements-bench.txt
	@.venv/bin/python examples/benchmark.py compare

# The server's root is the kit, because the notebooks link to its other folders.
lab: setup
	@.venv/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: setup
	@for notebook in notebooks/*.ipynb; do \
		.venv/bin/python -m helpers.notebook "$$notebook" --store || exit 1; \
	done

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

setup:
	@PYTHON="$(PYTHON)" ./setup.sh
