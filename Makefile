# Two commands do everything on a fresh machine: `make demo` and `make test`. Each prepares .venv by itself (tools/prepare.py).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: bench-scale demo demo-keep test test-compiled test-unit test-netns test-cluster cluster cluster-down image check lint bench bench-quick architecture manifests lock venv clean help

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Half an hour of real kernels, clusters and peers: four failures are tried once more, shown and counted in the closing line (CONTRIBUTING.md)
AGAIN := --reruns 1 --max-suite-reruns 4 --rerun-show-tracebacks

demo: venv ## three workloads on this machine: mTLS, authorization, live policy, rotation under load; cleans up
	$(BIN)/pillion demo

demo-keep: venv ## the demo, left running to look around in (ends with: .venv/bin/pillion local down --name demo)
	$(BIN)/pillion demo --keep

test: venv ## every test this machine can run; says which it skips and why. The cluster comes last, when nothing else wants the processors
	$(PYTEST) $(AGAIN) --ignore=tests/cluster
	$(PYTEST) $(AGAIN) tests/cluster

test-unit: venv ## tests without root, namespaces or a cluster
	$(PYTEST) -m "not netns and not kernel and not cluster and not slow"

test-netns: venv ## tests in network namespaces (root)
	$(PYTEST) -m netns

test-compiled: venv ## the data path's tests once more, with its hottest modules compiled by mypyc (needs gcc and python3-dev)
	tools/test-compiled.sh $(AGAIN)

test-cluster: venv ## tests on a Kubernetes made here (root, Go), or on the one that KUBECONFIG names: docs/cluster.md
	$(PYTEST) tests/cluster $(ARGS)

cluster: venv ## a Kubernetes on this machine with Pillion's images in it, to play with (root, Go); prints how to reach it
	$(BIN)/python -m tests.cluster up

cluster-down: venv ## end that Kubernetes and remove all of it
	$(BIN)/python -m tests.cluster down

image: venv ## the image and the agent's as archives for docker load, kind and k3d (root); from a registry: docs/image.md
	$(BIN)/python tools/image.py build --hot compiled
	$(BIN)/python tools/image.py build --hot compiled --agent

lint: venv ## ruff, mypy --strict, import contracts, architecture page against the tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_architecture.py

check: lint test-compiled test ## lint, then test both ways

bench: venv ## the full measurements (twenty minutes; needs a quiet machine)
	$(BIN)/python -m bench

bench-scale: venv ## one policy controller, a simulated cluster of 10,000 pods and 2,000 sidecars (a minute; needs a quiet machine)
	$(BIN)/python -m bench.scale --out bench/results/scale.json

bench-quick: venv ## one short round of every row (three to four minutes), to see that every contestant answers
	$(BIN)/python -m bench --quick

architecture: venv ## write the list of modules in ARCHITECTURE.md anew
	$(BIN)/python tools/check_architecture.py --write

manifests: venv ## write what is derived in manifests/ and tests/golden anew
	$(BIN)/python tools/manifests.py

lock: ## write requirements.lock anew from the ranges in setup.cfg
	tools/lock.sh

venv: ## prepare .venv with everything, the command .venv/bin/pillion included
	@python3 tools/prepare.py

clean: ## remove what make made; nothing outside this folder
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist pillion.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
