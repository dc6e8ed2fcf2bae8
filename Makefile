# make demo [MODEL=path]   set up, convert a HuggingFace checkpoint, calibrate, chat with a PQ cache
# make test                set up and run the whole test suite
# make test-gpu            on a machine with a CUDA device: build for it, and run the tests that need one
# make tools               llama.cpp's tools with the PQ cache types, in build/cmake/bin
# make lint                ruff, mypy and import-linter
# CMAKE_ARGS is passed to llama.cpp's build: make test CMAKE_ARGS=-DGGML_CUDA=ON

VENV   ?= .venv
PYTHON ?= python3
MODEL  ?= examples/demo-model
BIN    := $(VENV)/bin

NATIVE := $(shell find CMakeLists.txt pyproject.toml cuda -type f 2>/dev/null)

.PHONY: demo test test-gpu tools upstream-tests lint clean

# torch is for the converter; the CPU build is enough and much smaller
TORCH ?= torch==2.13.0

$(VENV)/.python: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" cmake ninja
	touch $@

# the build requirements are installed already, so the build tree and its cache stay valid between runs
$(VENV)/.package: $(VENV)/.python $(NATIVE)
	$(BIN)/python -m pip install --verbose --no-build-isolation --editable ".[convert,test,dev]"
	touch $@

demo: $(VENV)/.package
	$(BIN)/million demo --model "$(MODEL)"

upstream-tests: $(VENV)/.package
	$(BIN)/cmake --build build/cmake --target million-upstream-tests

tools: $(VENV)/.package
	$(BIN)/cmake --build build/cmake --target million-tools

test: upstream-tests lint
	MILLION_REQUIRE_NATIVE=1 MILLION_TOOLS_DIR=$(CURDIR)/build/cmake/bin $(BIN)/python -m pytest

$(VENV)/.package-cuda: $(VENV)/.python $(NATIVE)
	$(BIN)/python -m pip install --verbose --no-build-isolation --editable ".[convert,test,dev]"
	touch $(VENV)/.package $@

test-gpu: export CMAKE_ARGS += -DGGML_CUDA=ON
test-gpu: $(VENV)/.package-cuda
	$(BIN)/cmake --build build/cmake --target million-upstream-tests
	$(BIN)/cmake -S cuda -B build/cuda -DMILLION_CUDA=ON
	$(BIN)/cmake --build build/cuda --target pq-cuda-test pq-cuda-codec-test --parallel
	MILLION_REQUIRE_NATIVE=1 MILLION_TOOLS_DIR=$(CURDIR)/build/cmake/bin MILLION_CUDA_TESTS_DIR=$(CURDIR)/build/cuda \
		$(BIN)/python -m pytest -m gpu

# import-linter reads a folder that looks as the installed package does: bindings/ and converters/ inside million_gguf/;
# -S keeps the editable install's import hook, which would find the build's folder first, out of it
lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/mypy
	rm -rf build/lint && mkdir -p build/lint/million_gguf
	ln -s $(CURDIR)/million_gguf/* $(CURDIR)/bindings $(CURDIR)/converters build/lint/million_gguf/
	cd build/lint && PYTHONPATH=.:$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		$(abspath $(BIN))/python -S $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

clean:
	rm -rf build $(VENV)
