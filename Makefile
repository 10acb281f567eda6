# `make demo` and `make test` are all that a fresh machine needs; both set up .venv first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .tools
# DVC runs `python`; it must be this environment's.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup tools demo submit show test test-long lint check docs bench bench-growth bench-engines bench-training bench-workers bench-objectives bench-serving scale lock hashes sbom clean bench-checkpoints bench-localisation

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(VENV)/installed  ## .venv from requirements.lock

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Darkmatter needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (several GB; about five minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

tools: $(TOOLS)/installed  ## what checks infra/, in an environment of its own: checkov, kubectl, promtool and others

$(TOOLS)/installed: infra/tools.lock infra/tools.sh
	@echo "Installing what checks infra/ into $(TOOLS) (a minute or two) ..."
	@PYTHON=$(PYTHON) infra/tools.sh $(TOOLS)
	@touch $@

demo: setup  ## the whole pipeline on the built-in digits
	$(BIN)/dvc repro
	@$(BIN)/python -m darkmatter.report

submit: setup  ## the pipeline of REF as a job on a Ray cluster: REPOSITORY=url ADDRESS=http://head:8265 PLACE=file (docs/jobs.md)
	$(BIN)/python -m darkmatter.jobs submit --repository $(or $(REPOSITORY),$(shell git remote get-url origin 2>/dev/null)) \
	  --ref $(or $(REF),main) $(if $(BRANCH),--branch $(BRANCH)) $(if $(ADDRESS),--address $(ADDRESS)) $(if $(PLACE),--place $(PLACE))

show: setup  ## the results of the last run
	@$(BIN)/python -m darkmatter.report

test: setup tools  ## all tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: setup  ## the tests that take minutes each: every kind of fault (quarter of an hour)
	$(BIN)/python -m pytest -m long

lint: setup  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## what CI runs

docs: setup  ## docs/params.md, the tables of docs/objectives.md, docs/licences.md
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/supply.py licences

bench: setup  ## the data path beside the usual one; PHOTOS=folder of large photographs; writes docs/performance.md
	$(BIN)/python benchmarks/data.py $(if $(PHOTOS),--photographs $(PHOTOS))

bench-growth: setup  ## ingest of 1,000, 200,000 and 1,000,000 files: time and memory (half an hour)
	$(BIN)/python benchmarks/ingest.py --files 1000 200000 1000000

bench-engines: setup  ## few-shot accuracy by each engine of the views; CLIP_ART=folder of labelled images
	$(BIN)/python benchmarks/engines.py folder:$(CLIP_ART)

bench-training: setup  ## a step beside lightly's, the cost of a save; IMAGES=folder of colour images (an hour)
	$(BIN)/python -m pip install --quiet --no-deps lightly==1.6.0 lightly_utils==0.0.2 lightning-utilities
	$(BIN)/python benchmarks/training.py folder:$(IMAGES)

bench-workers: setup  ## Ray beside torchrun, two workers beside one; IMAGES=folder of colour images (a quarter of an hour)
	$(BIN)/python benchmarks/workers.py folder:$(IMAGES)

bench-objectives: setup  ## every objective beside the others and lightly's; CLIP_ART=folder adds a second data set
	$(BIN)/python -m pip install --quiet --no-deps lightly==1.6.0 lightly_utils==0.0.2
	$(BIN)/python benchmarks/objectives.py --data digits=builtin:mnist
	$(BIN)/python benchmarks/objectives.py --data digits=builtin:mnist --method mae --vit
	$(if $(CLIP_ART),$(BIN)/python benchmarks/objectives.py --data "clip art=folder:$(CLIP_ART)" --epochs 3)
	$(BIN)/python docs/generate.py

scale: setup  ## the tables and the picture of docs/scale.md
	$(BIN)/python benchmarks/scale.py

bench-serving: setup  ## the champion over HTTP beside a call in process; its programs beside the network (some minutes)
	$(BIN)/python benchmarks/serving.py

bench-checkpoints: setup  ## which number without labels ranks checkpoints as few-shot accuracy does; writes docs/evaluation.md
	$(BIN)/python benchmarks/checkpoints.py builtin:mnist

bench-localisation: setup  ## who knows where things are; CLIP_ART=folder of labelled images; writes docs/evaluation.md
	$(BIN)/python benchmarks/localisation.py $(CLIP_ART)

lock:  ## pin again, after a change of the dependencies (needs uv)
	uv pip compile pyproject.toml --extra demo --extra dev --universal --python-version 3.11 \
	  --no-header --no-annotate --no-emit-index-url --constraint requirements.constraints -o requirements.lock
	sed -i -E 's/^(torch|torchvision)==/\1===/' requirements.lock

hashes: setup  ## requirements.hashes: what pip installs here, by sha256, for `pip install --require-hashes`
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report .cache/pip.json --requirement requirements.lock
	$(BIN)/python docs/supply.py hashes .cache/pip.json

sbom: setup  ## sbom.json: what is installed, as CycloneDX 1.6, checked by its schema
	$(PYTHON) -m venv $(VENV)/sbom  # of its own: it brings a chardet that requests warns of
	$(VENV)/sbom/bin/python -m pip install --quiet cyclonedx-bom==7.5.0
	$(VENV)/sbom/bin/cyclonedx-py environment --validate --sv 1.6 --of JSON --output-reproducible \
	  --pyproject pyproject.toml -o sbom.json $(BIN)/python

clean:  ## what runs made; not .venv, not the registry
	rm -rf data models plots metrics report.html checkpoints
