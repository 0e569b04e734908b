# Everything starts from a machine with Python 3.11+ and nothing else.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# OpenMP's threads give up waiting sooner, which costs nothing alone and saves most of the time beside another busy
# process (benchmarks/throughput.py).
export GOMP_SPINCOUNT ?= 30000

.PHONY: demo test slow fast check style
demo: .venv/train
	$(BIN)/python scripts/demo.py

test: .venv/dev
	$(BIN)/python -m pytest -n auto

fast: .venv/dev
	$(BIN)/python -m pytest -n auto -m "not slow"

slow: .venv/dev
	$(BIN)/python -m pytest -n auto -m slow

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

style: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train: .venv/bin/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,plots,fit]"
	touch $@

.venv/dev: .venv/bin/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ .venv/train
