# Targets are the README's commands. Variables: PYTHON (makes the environment), VENV (where it is), PYTEST_ARGS,
# CONSTRAINTS. An environment of your own is used as it is with `make <target> BIN=$(dirname $(which python))/`.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
PYTEST_ARGS ?= -n 2

ifdef BIN
READY :=
else
BIN := $(abspath $(VENV))/bin/
READY := $(VENV)/.installed
endif

.PHONY: help venv demo test lint format docs bench gpu

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /make \1\t/'

venv: $(READY)  ## create .venv from the pinned constraints

# --no-compile halves the time: Python compiles what is imported, when it is.
$(VENV)/.installed: $(CONSTRAINTS) pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)pip install --disable-pip-version-check -q --no-compile -c $(CONSTRAINTS) setuptools $$(grep ^torch== $(CONSTRAINTS))
	$(BIN)pip install --disable-pip-version-check -q --no-compile -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY)  ## post-train the embedded model, evaluate before and after
	PATH="$(BIN):$$PATH" $(BIN)deepspeed engine/train.py --config configs/zero3_dit.json

test: $(READY)  ## all tests that need no GPU
	$(BIN)pytest $(PYTEST_ARGS)

lint: $(READY)  ## ruff, as pre-commit runs it
	$(BIN)ruff check
	$(BIN)ruff format --check

format: $(READY)  ## let ruff repair what it can
	$(BIN)ruff check --fix
	$(BIN)ruff format

docs: $(READY)  ## write the key table of configs/README.md from the schema
	$(BIN)python -P -c "from latent_critic.engine import config, config_text as text; \
		text.write_key_table(config.Config, 'configs/README.md')"

bench: $(READY)  ## kernel and throughput benchmarks into bench/results
	$(BIN)python bench/kernels.py
	$(BIN)python bench/throughput.py

# The kernels' own tests run on the GPU where there is one; compiling for other targets is tested where there is none.
# A failure does not stop what comes after it, but the exit status tells.
gpu: $(READY)  ## tests of the kernels and tests marked gpu, then both benchmarks, into $OUT (default bench/results)
	@out="$${OUT:-bench/results}"; status=0; mkdir -p "$$out"; set -x; \
	$(BIN)python -m pytest -n 8 tests/kernels --ignore=tests/kernels/test_compiled.py \
		--junitxml="$$out/kernel-tests.xml" || status=1; \
	$(BIN)python -m pytest -n 2 -m gpu tests/engine --junitxml="$$out/gpu-tests.xml" || status=1; \
	$(BIN)python bench/kernels.py --rounds 20 --output-dir "$$out" || status=1; \
	$(BIN)python bench/throughput.py --output-dir "$$out" || status=1; \
	exit $$status
