# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
# The CPU build where the index serves one; override with TORCH="torch" on a GPU machine.
TORCH  ?= torch==2.13.0

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCE := $(shell find csrc -type f 2>/dev/null)

.PHONY: setup demo test lint coverage sanitize bench clean

setup: $(STAMP)

# torch comes first: a dependency's open range on an empty environment would pull gigabytes of CUDA.
$(STAMP): pyproject.toml setup.py $(SOURCE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $(STAMP)

# The main job: the paper's 40,000 steps; running it again continues or shows the finished run.
demo: setup
	$(BIN)/spd-fast run tms_5-2 --out runs/demo --resume

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C++ tests under AddressSanitizer and UBSan. The two `uninitialized` warnings are g++ 12's own,
# in its AVX-512 headers.
sanitize:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
	  -fno-sanitize-recover=all -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra \
	  -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -Wno-ignored-attributes -pthread \
	  csrc/tests/test_kernels.cpp csrc/cpu/*.cpp -o build/test_kernels_sanitized
	./build/test_kernels_sanitized

coverage: setup
	$(BIN)/python -m pytest --cov --cov-report=term

clean:
	rm -rf build *.egg-info spd_fast/*.so .pytest_cache .ruff_cache .mypy_cache
