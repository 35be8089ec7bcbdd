# Two commands: `make train` and `make test`. Each sets up what it needs from a bare Python >= 3.12.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
CUDA := $(shell command -v nvidia-smi >/dev/null && echo ,cuda)
ARGS ?=
WORKERS ?= 2

# A file's tests run in one worker (tests/conftest.py), the heavy ones before the last folders' light ones.
PYTEST = -m pytest -rs -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations=15
# What uses most of the libraries' interfaces.
NEWEST = tests/ops tests/layers tests/pallas tests/data tests/interop/test_nnx.py tests/training/test_train.py

.PHONY: help train test test-newest test-eval types lint docs clean

help:  ## lists the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## */\t/' | expand -t 16

train: .venv/.installed  ## trains a small model; options: make train ARGS="--help"
	.venv/bin/python experiments/train.py $(ARGS)

test: .venv/.installed  ## runs the test-suite on the CPU
	.venv/bin/python $(PYTEST) tests $(ARGS)

test-newest: .venv-newest/.installed  ## runs what finds changed interfaces on the newest versions of the libraries
	.venv-newest/bin/python $(PYTEST) -m "not slow" --first-cases $(NEWEST) $(ARGS)

test-eval: .venv/.eval  ## runs the tests that need lm-evaluation-harness, some 500 MB of packages
	.venv/bin/python -m pytest tests/evaluation tests/experiments/test_evaluate.py $(ARGS)

types: .venv/.installed  ## checks that values have the shapes and dtypes of their annotations
	.venv/bin/python -m pytest --jaxtyping-packages=gdn2_jax,beartype.beartype tests/annotations.py $(ARGS)

lint: .venv/.installed  ## checks style, and types without running anything
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

docs: .venv/.docs  ## builds the documentation into build/site
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

.venv/.eval: .venv/.installed
	.venv/bin/python -m pip install --quiet --editable ".[eval]" --constraint constraints.txt
	@touch $@

.venv/.docs: .venv/.installed
	.venv/bin/python -m pip install --quiet --editable ".[docs]" --constraint constraints.txt
	@touch $@

.venv/.installed: setup.py constraints.txt
.venv-newest/.installed: setup.py constraints-newest.txt

%/.installed:
	@test -n "$(PYTHON)" || { echo "gdn2-jax needs Python >= 3.12 on the PATH (or PYTHON=/path/to/python3.12)"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 12) and "gdn2-jax needs Python >= 3.12, but $(PYTHON) is %d.%d" % v[:2])'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --editable ".[train,test$(CUDA)]" --constraint $(filter constraints%,$^)
	@# For the guide to other people's models. Its bounds exclude current numpy and typeguard, with which it works.
	$*/bin/python -m pip install --quiet --no-deps recurrentgemma==1.0.1 --constraint $(filter constraints%,$^)
	@touch $@

clean:  ## removes what make has installed and built
	rm -rf .venv .venv-newest build *.egg-info .pytest_cache .ruff_cache .hypothesis
