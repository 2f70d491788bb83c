# Two commands are all that a checkout needs: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart tiny test lint format docs audit clean
.DEFAULT_GOAL := quickstart

# an environment with the tested versions; made anew when what it is made of changes
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

quickstart: $(VENV)/.ready  ## prune SmolLM2-135M to 50 % and reconstruct it
	$(BIN)/lit-prune fit --config configs/quickstart.yaml

tiny: $(VENV)/.ready  ## the same on the tiny committed model, without any download
	$(BIN)/lit-prune fit --config configs/tiny.yaml

# file by file on two processes of one thread each: threads of small tensors would only wait for each other
test: $(VENV)/.ready-dev  ## every test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-dev  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready-docs  ## the site, in build/docs; warnings are errors
	HF_HUB_OFFLINE=1 $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

audit: $(VENV)/.ready-dev  ## known vulnerabilities of the pinned versions; needs the network
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) *.egg-info build dist
