# camcal's tasks. `make` alone lists them. They need make, pip and Python 3.11 or newer, nothing else.

# A setting given to camcal itself (CAMCAL_PORT=9000 make serve) counts here too.
BUNDLE ?= $(or $(CAMCAL_BUNDLE),models/pretrained/caltech100)
PORT ?= $(or $(CAMCAL_PORT),8000)
# No `?=` here: some shells and conda export a HOST that means something else. `make serve HOST=0.0.0.0` works.
HOST := $(or $(CAMCAL_HOST),127.0.0.1)
# ONNX Runtime sends usage data to its maker unless told not to.
export ORT_DISABLE_TELEMETRY := 1
# Extra arguments for pytest: make test ARGS="tests/service -x"
ARGS ?=
# make lock UPGRADE=1 takes the newest versions; without it, a pin that still fits stays.
UPGRADE ?=
# The first interpreter that is new enough. `make serve PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Quiet twice: progress and warnings are silent, errors are not.
PIP_INSTALL = pip install --quiet --quiet --disable-pip-version-check
COMPILE = .venv-lock/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--fork-strategy fewest --generate-hashes --no-strip-extras --no-emit-index-url --custom-compile-command "make lock" \
	$(if $(UPGRADE),--upgrade)

# $(call environment,FOLDER,LOCK): a virtual environment with what requirements/LOCK.txt pins.
# An interpreter that has gone (a removed Python, a moved folder) makes a fresh one.
define environment
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "camcal needs Python 3.11 or newer: $(or $(PYTHON),python3) is older or missing." \
			"Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$1/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $1 || { \
		echo "Could not make $1. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$1/bin/$(PIP_INSTALL) --require-hashes -r requirements/$2.txt
endef

# $(call camcal,FOLDER): camcal itself, editable, with the pinned build backend.
define camcal
	@$1/bin/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
endef

# Whose photographs `make heatmap-gallery` shows: the folder of a finished run.
RUN ?= runs/caltech100
HEATMAPS = TQDM_DISABLE=1 PYTHONPATH=.venv-bench/heatmaps .venv-dev/bin/python -m tests.benchmarks.heatmaps

define CHECKS
.venv-dev/bin/ruff check
	.venv-dev/bin/ruff format --check
	.venv-dev/bin/mypy
endef
PYTEST = OMP_NUM_THREADS=1 .venv-dev/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile
# The tests of `make check`: those that start no service and train no network.
QUICK = tests/models tests/test_docs.py tests/test_repository.py

.DEFAULT_GOAL := help
.PHONY: help serve check test fuzz soak sbom bench-training bench-serving bench-heatmaps heatmap-gallery pictures format openapi results docs lock clean

help: ## List these tasks
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

serve: .venv/.ready ## Serve BUNDLE at HOST:PORT (models/pretrained/caltech100 at 127.0.0.1:8000)
	@echo "camcal: serving $(BUNDLE) at http://$(HOST):$(PORT)/ (Ctrl-C stops it)"
	@CAMCAL_BUNDLE="$(BUNDLE)" CAMCAL_HOST="$(HOST)" CAMCAL_PORT="$(PORT)" exec .venv/bin/camcal serve

check: .venv-dev/.ready ## Lint, check formatting and types, run the quick tests, in less than a minute
	$(CHECKS)
	$(PYTEST) $(QUICK) $(ARGS)

test: .venv-dev/.ready ## Lint, check formatting and types, run the tests (ARGS for pytest)
	$(CHECKS)
	$(PYTEST) $(ARGS)

fuzz: .venv-dev/.ready .venv-bench/fuzz/.ready ## Fuzz images, parsers and the API (ARGS="decode --count 1000"; --help lists more)
	PYTHONPATH=.venv-bench/fuzz .venv-dev/bin/python -m tests.fuzz $(ARGS)

soak: .venv-dev/.ready ## Serve mixed traffic with faults for an hour (ARGS="--minutes 10"; --help lists more)
	.venv-dev/bin/python -m tests.soak $(ARGS)

bench-training: .venv-dev/.ready ## Measure an epoch against the usual loop, on a quiet machine (ARGS="--repeats 5")
	.venv-dev/bin/python -m tests.benchmarks.training $(ARGS)

format: .venv-dev/.ready ## Sort imports, mend what the linter can, format
	.venv-dev/bin/ruff check --fix
	.venv-dev/bin/ruff format

openapi: .venv-dev/.ready ## Write openapi.yaml from the app
	.venv-dev/bin/camcal openapi > .venv-dev/openapi.yaml
	@mv .venv-dev/openapi.yaml openapi.yaml

results: .venv-dev/.ready ## Write docs/benchmarks/results.md from docs/results/*.json
	.venv-dev/bin/camcal results --markdown > .venv-dev/results.md
	@mv .venv-dev/results.md docs/benchmarks/results.md

docs: .venv-docs/.ready ## Build the documentation site into site/ and check its links
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lock: .venv-lock/.ready ## Pin what pyproject.toml asks for (UPGRADE=1 for the newest)
	$(COMPILE) --extra cpu --group build --output-file requirements/serve.txt
	$(COMPILE) --extra gpu --group build --output-file requirements/gpu.txt
	$(COMPILE) --extra cpu --extra train --extra weights --extra dev --group build --output-file requirements/dev.txt
	$(COMPILE) --extra cpu --group build --group docs --output-file requirements/docs.txt
	$(subst pyproject.toml,--group lock,$(COMPILE)) --output-file requirements/uv.txt
	$(subst pyproject.toml,--group sbom,$(COMPILE)) --output-file requirements/sbom.txt

sbom: .venv-sbom/.ready ## Write a software bill of materials for each lock into dist/ (CycloneDX)
	@mkdir -p dist
	for lock in serve gpu dev; do PYTHONWARNINGS=ignore .venv-sbom/bin/cyclonedx-py requirements --pyproject pyproject.toml \
		--output-reproducible --output-file dist/sbom-$$lock.json requirements/$$lock.txt || exit 1; done

bench-serving: .venv/.ready .venv-dev/.ready ## Measure camcal beside other servers, for 35 minutes (see ARGS="--help")
	.venv-dev/bin/python -m tests.benchmarks.serving $(ARGS)

bench-heatmaps: .venv-dev/.ready .venv-bench/heatmaps/.ready ## Measure heatmaps against boxes, for hours (see ARGS="--help")
	$(HEATMAPS) table $(ARGS)

heatmap-gallery: .venv-dev/.ready .venv-bench/heatmaps/.ready ## Draw heatmaps of photographs chosen by lot (RUN=runs/caltech100)
	$(HEATMAPS) gallery $(RUN) $(ARGS)

pictures: .venv-dev/.ready ## Draw the service's pictures in docs/images anew (needs Chromium)
	.venv-dev/bin/python -m tests.benchmarks.pictures models/pretrained/caltech100

clean: ## Remove the virtual environments, caches and build leftovers
	rm -rf .venv .venv-dev .venv-docs .venv-lock .venv-sbom .venv-bench build dist site src/camcal.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find docs models training service src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: requirements/serve.txt pyproject.toml
	@echo "camcal: setting up .venv for serving (the first time takes about half a minute)"
	$(call environment,.venv,serve)
	$(call camcal,.venv)

.venv-dev/.ready: requirements/dev.txt pyproject.toml
	@echo "camcal: setting up .venv-dev with torch (the first time takes a few minutes and about 6 GB)"
	$(call environment,.venv-dev,dev)
	$(call camcal,.venv-dev)

# Beside .venv-dev, which has torch: only what that does not have.
.venv-bench/heatmaps/.ready: tests/benchmarks/heatmaps/requirements.txt .venv-dev/.ready
	.venv-dev/bin/$(PIP_INSTALL) --no-deps --no-build-isolation --require-hashes --upgrade \
		--target .venv-bench/heatmaps -r $<
	@touch $@

.venv-bench/fuzz/.ready: tests/fuzz/requirements.txt .venv-dev/.ready
	.venv-dev/bin/$(PIP_INSTALL) --no-deps --require-hashes --upgrade --target .venv-bench/fuzz -r $<
	@touch $@

.venv-docs/.ready: requirements/docs.txt pyproject.toml
	@echo "camcal: setting up .venv-docs for the documentation (about half a minute, 450 MB)"
	$(call environment,.venv-docs,docs)
	$(call camcal,.venv-docs)

.venv-sbom/.ready: requirements/sbom.txt
	@echo "camcal: setting up .venv-sbom"
	$(call environment,.venv-sbom,sbom)
	@touch $@

.venv-lock/.ready: requirements/uv.txt
	@echo "camcal: setting up .venv-lock"
	$(call environment,.venv-lock,uv)
	@touch $@
