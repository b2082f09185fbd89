# What a developer types, all inside the environment VENV: nothing is installed anywhere else.

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= $(VENV)-docs
PEERS_VENV ?= $(VENV)-peers
BASES ?= 16,32,64

PINS := .ci/versions.txt
STAMP := $(VENV)/.unet-ray
RUN := $(VENV)/bin/python -m

# Clones may share one VENV: the clone that is tested must win over the one installed there.
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow fuzz mutants bench bench-peers check docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  (VENV=DIR: the environment to use or make; PYTHON=FILE: the Python to make it from)"

demo: $(STAMP) ## make synthetic microscopy, train, segment on Ray and score it, in demo/
	$(RUN) unet_ray demo --out demo

test: $(STAMP) ## run the tests, a few minutes
	$(RUN) pytest -n 2 --dist loadfile

test-slow: $(STAMP) ## run the tests that take minutes each
	$(RUN) pytest -m slow

fuzz: $(STAMP) ## read 2,000 damaged files, each under limits of time and memory, a few minutes
	OMP_NUM_THREADS=1 $(RUN) tests.fuzz 2000

mutants: $(STAMP) ## change the code in one place at a time; a test must fail each time
	$(RUN) tests.mutants

bench: $(STAMP) ## measure speed, beside other libraries where they do the same
	$(RUN) tests.bench_scores
	$(RUN) tests.bench_training
	$(RUN) tests.bench_engine
	$(RUN) tests.bench_gpu 60
	$(RUN) tests.bench_plan
	$(RUN) tests.bench_memory 2

# MONAI and nnU-Net have an environment of their own, with the same versions of what we share.
bench-peers: override VENV := $(PEERS_VENV)
bench-peers: ## measure beside MONAI and nnU-Net, about two hours (BASES=32: one size)
	@$(VENV)/bin/python -c 'import monai, nnunetv2, unet_ray' 2>/dev/null || { \
		{ [ -x $(VENV)/bin/python ] || ( $(MAKE_VENV) ); } && \
		$(VENV)/bin/python -m pip install --quiet -c $(PINS) -c .ci/peers-versions.txt \
			-e . monai nnunetv2; }
	$(VENV)/bin/python -m tests.bench_peers build/peers $(BASES)
	$(VENV)/bin/python -m tests.bench_steps build/steps $(BASES)
	$(VENV)/bin/python -m tests.bench_steps profile

check: $(STAMP) ## lint, formatting and types
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

# Its pins differ from those of the tests, so it has an environment of its own.
docs: override VENV := $(DOCS_VENV)
docs: ## build the site of the documentation in build/site
	@$(VENV)/bin/python -c 'import mkdocs, material, mkdocs_jupyter' 2>/dev/null || { \
		{ [ -x $(VENV)/bin/python ] || ( $(MAKE_VENV) ); } && \
		$(VENV)/bin/python -m pip install --quiet -r .ci/docs-versions.txt; }
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict -f .github/mkdocs.yml

clean: ## remove what the targets above made in this folder, except the environment
	rm -rf demo build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find unet_ray jobs tests -name __pycache__ -prune -exec rm -rf {} +

test test-slow mutants: export RAY_USAGE_STATS_ENABLED = 0
test test-slow mutants: export RAY_DATA_DISABLE_PROGRESS_BARS = 1
test test-slow mutants: export RAY_ENABLE_UV_RUN_RUNTIME_ENV = 0

# The stamp is a copy of the two files that decide what is installed. They are compared, not their
# times: a fresh clone of the same version needs no new install, an older one does.
ready := $(shell cat pyproject.toml $(PINS) | cmp -s - $(STAMP) && $(VENV)/bin/python -V)
ifeq (,$(ready))
.PHONY: $(STAMP)
endif

# Workers of Ray start slowly without bytecode: --compile, whatever the user's settings for pip say.
$(STAMP):
	@rm -f $@
	@$(RUN) pip --version >/dev/null 2>&1 || { $(MAKE_VENV); }
	$(RUN) pip install --quiet --compile -c $(PINS) -e '.[dev]'
	@cat pyproject.toml $(PINS) >$@.part && mv $@.part $@

# A PYTHON that the user names is tried alone. A broken environment is emptied first, but nothing
# is ever deleted in a folder that is not an environment.
PYTHONS = $(strip $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11))
define MAKE_VENV
clear=; for python in $(PYTHONS); do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		if [ -f $(VENV)/pyvenv.cfg ] && ! $(VENV)/bin/python -c '' 2>/dev/null; then clear=--clear; fi; \
		echo "$$python -m venv $$clear $(VENV)"; \
		exec "$$python" -m venv $$clear $(VENV); \
	fi; \
done; \
echo "unet-ray needs Python 3.11 or newer, which none of these is: $(PYTHONS)" \
	"(name one: make PYTHON=FILE)." >&2; \
exit 1
endef
