# make help lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser test-cluster test-gpu cluster-up cluster-down lint
.PHONY: bench bench-statistics bench-cluster bench-gpu grid study report dashboard sync clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Train a target on digits, attack it, print the table (about 3 minutes)
	$(BIN)/python run.py

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-browser: $(READY) ## Run the tests of the report in Chromium, which must be installed
	$(BIN)/python -m pytest tests/browser

test-cluster: $(READY) ## Run the tests on a SLURM of two nodes, which is started for them (root, Linux)
	$(BIN)/python -m pytest tests/cluster

test-gpu: $(READY) ## Run the tests of what a GPU must not change, on a machine that has one
	$(BIN)/python -m pytest tests/gpu

cluster-up: $(READY) ## Start a SLURM of two nodes on this machine, to try things by hand
	$(BIN)/python -m tests.cluster.cluster up

cluster-down: $(READY) ## Stop it
	$(BIN)/python -m tests.cluster.cluster down

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## Print ratios of speed and memory, measured in one run
	$(BIN)/python -m tests.bench

bench-statistics: $(READY) ## Simulate how often intervals cover, bounds hold and tests reject (docs/statistics.md)
	$(BIN)/python -m tests.bench_statistics

bench-cluster: $(READY) ## Compare an array on two nodes with one node
	$(BIN)/python -m tests.cluster.bench

bench-gpu: $(READY) ## Measure training and scoring of the CIFAR-10 network on this machine's GPU
	$(BIN)/python -m tests.gpu.bench

# A model, or a cell, that failed leaves the others: the stages go on, and the exit status tells. Repeated, it does what is missing.
GRID = $(BIN)/python run.py experiment=$(or $(EXPERIMENT),gray_box_grid) cluster=$(or $(CLUSTER),local) $(SET)

grid: $(READY) ## Train, attack, report: make grid EXPERIMENT=headline CLUSTER=slurm SET="training.steps=100"
	failed=0; $(GRID) stage=train || failed=1; $(GRID) stage=attack || failed=1; \
	$(BIN)/python -m diffmia_exp.report $(or $(RUNS),outputs) || failed=1; exit $$failed

# Each part takes less than an hour on two cores and can be run alone; what is in the store is not made again.
study: $(READY) ## Run the study part by part and draw it, in hours: make study [PART=study_members] [CLUSTER=local_parallel] [SET=..]
	failed=0; for part in $(or $(PART),study $(basename $(notdir $(wildcard conf/experiment/study_*.yaml)))); do \
	$(BIN)/python run.py experiment=$$part cluster=$(or $(CLUSTER),local) $(SET) || failed=1; done; \
	$(BIN)/python -m diffmia_exp.study $(or $(OUTPUT_DIR),outputs) || failed=1; exit $$failed

report: $(READY) ## Write an HTML report: make report RUNS=outputs/runs [WANDB=1 to log it to W&B too]
	$(BIN)/python -m diffmia_exp.report $(or $(RUNS),outputs) $(if $(WANDB),--wandb)

dashboard: $(READY) ## Save a W&B workspace: make dashboard ENTITY=me PROJECT=diffmia_exp [REPORT=1 for a W&B report]
	$(BIN)/python -m diffmia_exp.dashboard $(if $(ENTITY),--entity $(ENTITY)) $(if $(PROJECT),--project $(PROJECT)) $(if $(REPORT),--report)

sync: $(READY) ## Upload the W&B runs that were logged offline; it can be repeated
	$(BIN)/python -m diffmia_exp.sync $(or $(OUTPUT_DIR),outputs)

clean: ## Delete the virtual environment and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
