# Everything starts from a machine with Python 3.11+ and nothing else; the library itself is read by 3.10 too.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# OpenMP's threads give up waiting sooner, which costs nothing alone and saves most of the time beside another busy
# process (benchmarks/throughput.py).
export GOMP_SPINCOUNT ?= 30000

# A file's tests stay in one process, which makes what they share once.
SIDE_BY_SIDE := -n auto --dist loadfile

# What the usual GPU image has beside torch 2.11, laid over the environment by tests/test_benchmarks.py.
IMAGE := transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9

.PHONY: demo test slow fast check style docs package sitting oldest newest versions front-ends front-ends-run
demo: .venv/train
	$(BIN)/python scripts/demo.py

test: .venv/dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

fast: .venv/dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not elsewhere"

slow: .venv/dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow" tests/test_house.py

package: .venv/dev
	.ci/package $(CURDIR)/$(BIN)/python

# All parts of a sitting on an accelerator, on tiny models, and the benchmark of a mixture's proxy: before a sitting.
sitting: .venv/dev
	HF_POWER_SITTING=1 $(BIN)/python -m pytest tests/test_benchmarks.py

style: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in site/; a link that leads nowhere is an error.
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The fast tests with the oldest versions that setup.cfg's extra train is tested with, and with the newest that the registry has.
oldest: .venv-oldest/dev
	.venv-oldest/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

newest: .venv-newest/dev
	.venv-newest/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

# The core beside the versions of transformers that other people's front ends pin.
versions: .venv/dev
	$(BIN)/python tests/versions.py 4.56.2 4.57.6 5.0.0 5.3.0 5.6.2 5.12.1 5.17.0 5.20.0

# Whether other people's front ends and hf_power fit into one environment; installs nothing but the resolver.
front-ends: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/python tests/front_ends.py --uv $(BIN)/uv

# Ten steps of each in an environment of its own pins: an hour or more, and some ten GB for uv's cache. A CPU build of torch is taken
# from pip's folder of wheels, or from torch's own index by UV_TORCH_BACKEND=cpu.
front-ends-run: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/python tests/front_ends.py --uv $(BIN)/uv --run $(BIN)/../front-ends

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train: .venv/bin/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,plots,fit]"
	touch $@

.venv/dev: .venv/bin/python setup.cfg constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .venv/image $(IMAGE)
	touch $@ .venv/train

.venv-oldest/dev: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	touch $@

# torch alone is pinned: a newer one brings gigabytes of CUDA.
.venv-newest/dev: setup.cfg
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 -e ".[dev]"
	touch $@
