# `make` alone lists the commands. Each sets up what it needs, in a virtual environment of its own.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test check check-form check-types check-imports check-wheel bench doctor clean
.DELETE_ON_ERROR:

VENV ?= .venv
# The first of these that runs; `make setup PYTHON=...` takes another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
# of the demo: 1 is one GPU, or the CPU
PROCESSES ?= 1
# of the tests: each takes 2 GB and a core
WORKERS ?= 2
DATA ?=
ARGS ?=

help: ## List the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

setup: $(VENV)/.installed ## Install what is needed into .venv (6.5 GB, about 3 minutes)

demo: $(VENV)/.installed ## Pretrain and probe on the built-in images: no data, no GPU needed
	@# runs/demo is this target's own: a finished one is trained again, an interrupted one goes on
	@if [ -e runs/demo/backbone.json ]; then rm -r runs/demo; fi
	$(VENV)/bin/accelerate launch --quiet --num_processes $(PROCESSES) --num_machines 1 \
		--num_cpu_threads_per_process $$(nproc) --mixed_precision no --dynamo_backend no \
		fastssl/train.py recipes/pirl_jigsaw.yaml train.out=runs/demo $(ARGS)

test: $(VENV)/.installed ## Run the tests; `make test ARGS="-k memory"` runs some
	@# a file's tests share what they have trained: they stay together
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

check: check-form check-types check-imports check-wheel ## Check form, types, imports and the wheel

check-form: $(VENV)/.installed-check
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

check-types: $(VENV)/.installed-check
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

check-imports: $(VENV)/.installed
	$(VENV)/bin/python -m pytest --quiet tests/test_imports.py

check-wheel: $(VENV)/.installed-check
	rm -rf build dist # setuptools would pack what an earlier build left there
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(VENV)/bin/check-wheel-contents dist/*.whl

bench: $(VENV)/.installed ## Which stage binds: make bench DATA=/folder/of/images (without: built-in ones)
	$(VENV)/bin/python -m benchmarks stages recipes/pirl_jigsaw.yaml \
		$(if $(DATA),'data.root=$(DATA)') $(ARGS)

doctor: $(VENV)/.installed ## Check this machine: versions, GPU, cores, disk, one batch
	$(VENV)/bin/python -m fastssl.doctor recipes/pirl_jigsaw.yaml $(if $(DATA),'data.root=$(DATA)')

clean: ## Remove the virtual environment and what was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

# Written last, so that an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo \
		"fastssl needs Python 3.10 to 3.13, found '$(PYTHON)': make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, apt install \
	python3-venv; or make setup PYTHON=/path/to/python3.11" >&2; rm -rf $(VENV); exit 1; }
	$(call install,test)
	touch $@

$(VENV)/.installed-check: $(VENV)/.installed
	$(call install,check)
	touch $@

# The packages without fastssl itself: commands and tests run as in a clone where nothing was
# installed, and no second copy of the code can answer an import. (pip has no option for that.)
define install
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[$(1)]'
	$(VENV)/bin/python -m pip uninstall --disable-pip-version-check --yes fastssl
endef
