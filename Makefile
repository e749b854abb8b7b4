# Everything a fresh machine needs is Python 3.10+, make and git; each target installs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICKSTART := quickstart
CATEGORY ?= bottle
REPOSITORY ?=
PYTHONS ?=

.PHONY: quickstart test test-cluster lint docs bench release lock clean
.DELETE_ON_ERROR:

# a small made-up image set, ingested, trained with two workers, evaluated and inspected; nothing is downloaded
quickstart: $(READY)
	$(BIN)/python jobs/quickstart.py --output $(QUICKSTART)

test: lint
	$(BIN)/python tests/run.py

# the browser, property tests of the HTTP API, several Ray nodes, replicas and workers that are killed
test-cluster: $(READY)
	$(BIN)/python -m pytest -m "cluster and not slow" --durations=10

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy focus_ray

# the documentation's site, in site/; a warning is an error. The quick tests build it too
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# beside the peers and the limits, the price of Ray, growth, into benchmarks/results/; then tests that are too slow for every change
bench: $(READY)
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "make bench DATA=mvtec CATEGORY=bottle WEIGHTS=resnet18.pth: a folder in MVTec's shape, one of its categories, ResNet-18's weights"; exit 1; }
	$(BIN)/python -m benchmarks.peer --data $(DATA)/$(CATEGORY) --weights $(WEIGHTS)
	$(BIN)/python -m benchmarks.limits --data $(DATA) --categories $(CATEGORY) --weights $(WEIGHTS)
	$(BIN)/python -m benchmarks.ray_price --data $(DATA) --categories $(CATEGORY) --weights $(WEIGHTS)
	$(BIN)/python -m benchmarks.scale --data $(DATA)/$(CATEGORY) --weights $(WEIGHTS)
	$(BIN)/python -m pytest -m slow

# every package is compared with the hashes of the two lock files, uv itself and what builds this package included
$(READY): requirements.lock container/build-requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "focus_ray needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r container/build-requirements.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --require-hashes --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# builds, checks and tries a release into dist/; uploads nothing
release: $(READY)
	$(BIN)/python release/release.py --repository "$(REPOSITORY)" $(if $(PYTHONS),--python $(PYTHONS))

LOCK := --universal --python-version 3.10 --generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade --quiet
lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev $(LOCK) --output-file requirements.lock
	$(BIN)/uv pip compile container/build-requirements.in --constraint requirements.lock $(LOCK) --output-file container/build-requirements.txt

clean:
	rm -rf $(VENV) $(QUICKSTART) site
