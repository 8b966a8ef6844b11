# Every target sets up what it needs in $(VENV) by itself: see .ci/bootstrap.

VENV ?= .venv
EXTRA ?=
ARGS ?=
PYTHON ?=
export PYTHON

comma := ,
extras = $(subst $(comma), ,$(EXTRA))
bin = $(VENV)/bin
# Test processes: compiling takes most of the time on a CPU; a GPU has one user at a time.
WORKERS ?= $(if $(findstring cuda,$(EXTRA)),0,2)
# Tests run on the CPU unless a CUDA extra is asked for; JAX_PLATFORMS in the environment wins over both.
test_platforms = $${JAX_PLATFORMS:-$(if $(findstring cuda,$(EXTRA)),cuda$(comma)cpu,cpu)}

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu bench docs lint format clean

help:  ## this text
	@echo 'Targets (each makes $(VENV) and installs what it needs):'
	@awk -F ':.*## +' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' Makefile
	@echo 'Variables:'
	@echo '  EXTRA=cuda12       also install this extra (cuda12, cuda13, triton; several with commas)'
	@echo '  ARGS="..."         arguments of pytest, of the demo or of the benchmarks'
	@echo '  WORKERS=n          test processes; 2 on the CPU, 0 (none but the main one) with a CUDA extra'
	@echo '  PYTHON=/path       make $(VENV) with this Python (>= 3.12) instead of looking for one'
	@echo '  VENV=folder        another virtual environment than .venv'

demo:  ## text through a small MoE language model with NVFP4 experts: a table, a plot, a sample
	@.ci/bootstrap $(VENV) bench $(extras)
	$(bin)/python experiments/demo.py $(ARGS)

test:  ## the test suite but for the slow tests, on the CPU unless EXTRA names a CUDA extra
	@.ci/bootstrap $(VENV) test $(extras)
	JAX_PLATFORMS="$(test_platforms)" $(bin)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-slow:  ## the slow tests: whole scripts, every tuned configuration, models on several meshes
	@.ci/bootstrap $(VENV) test $(extras)
	JAX_PLATFORMS="$(test_platforms)" $(bin)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(ARGS)

test-gpu: EXTRA := $(or $(EXTRA),cuda12)
test-gpu:  ## the tests that need one or several GPUs; EXTRA is cuda12 unless given
	@.ci/bootstrap $(VENV) test $(extras)
	JAX_PLATFORMS="$(test_platforms)" $(bin)/python -m pytest -n 0 -m "gpu or multigpu" $(ARGS)

bench:  ## every benchmark experiments/bench_*.py
	@.ci/bootstrap $(VENV) bench $(extras)
	@set -e; found=; for script in experiments/bench_*.py; do \
	    [ -e "$$script" ] || continue; found=yes; echo "$$script"; $(bin)/python "$$script" $(ARGS); \
	done; [ -n "$$found" ] || echo 'No benchmark in experiments/ yet.'

docs:  ## the pages of docs/ as a website in site/
	@.ci/bootstrap $(VENV) docs $(extras)
	$(bin)/mkdocs build --strict $(ARGS)

lint:  ## ruff check, ruff format --check, static types by pyrefly
	@.ci/bootstrap $(VENV) dev $(extras)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyrefly check --python-interpreter-path $(bin)/python

format:  ## let ruff format the code and fix what it can
	@.ci/bootstrap $(VENV) dev $(extras)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:  ## remove caches and build outputs, keep $(VENV)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .pyrefly_cache .hypothesis
	find . -name __pycache__ -not -path '*/.*' -prune -exec rm -rf {} +
