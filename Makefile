# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
# The CPU build where the index serves one; override with TORCH="torch" on a GPU machine.
TORCH  ?= torch==2.13.0

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCE := $(shell find csrc -type f 2>/dev/null)

.PHONY: setup demo paper paper-quick test lint coverage sanitize bench bench-memory bench-verify bench-micro profile kernels kernels-3.6 gpu clean

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

# Everything the paper claims, then docs/paper.md. Days on a CPU; running it again continues. For some
# of it: make paper ONLY='tms_5-2/*'. JOBS: runs side by side.
JOBS ?= 1
ONLY ?=
paper: setup
	$(BIN)/spd-fast paper --out runs/paper --jobs $(JOBS) $(if $(ONLY),--only '$(ONLY)')
	$(BIN)/spd-fast paper --page docs/paper.md runs/paper

# The same in small: minutes. It shows that everything runs, and proves nothing.
paper-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/spd-fast paper --quick --out runs/paper-quick --jobs 2

# Triton's interpreter is chosen when a kernel is first imported: those tests are a process of their own.
test: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels
	$(BIN)/python -m pytest --ignore=tests/kernels

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

# Speed beside the reference, torch.compile and the bare matrix products; writes bench/results/.
# The plots are drawn of whatever was right, also where the run ends with a wrong result.
bench: setup
	$(BIN)/python -m bench.run; status=$$?; $(BIN)/python -m bench.plot && exit $$status

# Memory against the number of components.
bench-memory: setup
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.plot

# Every provider's results and gradients against float64, at full size.
bench-verify: setup
	$(BIN)/python -m bench.verify

bench-micro: setup
	$(BIN)/python -m pytest bench/test_micro.py --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# One training step by phase and operation, and a trace for Perfetto.
EXPERIMENT ?= tms_40-10
BACKEND ?= auto
profile: setup
	mkdir -p build
	$(BIN)/python -m bench.profile_step $(EXPERIMENT) --backend $(BACKEND) --trace build/$(EXPERIMENT).json

# Every Triton kernel compiled for every target without a GPU: registers, shared memory, spills.
# OUT="bench/results/kernels_triton-{triton}.csv" writes the table; ONLY="--targets sm_90" cuts it short,
# ONLY=--full adds what docs/kernels.md says of odd sizes.
COMPILE := -m spd_fast.kernels.compile $(ONLY) $(if $(OUT),--out "$(OUT)")
kernels: setup
	$(BIN)/python $(COMPILE)

# The same with Triton 3.6, which current GPU machines carry, in a folder of its own.
TRITON_36 := build/triton-3.6
$(TRITON_36)/.installed:
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade \
	  --target $(TRITON_36) "triton==3.6.0"
	touch $@
kernels-3.6: setup $(TRITON_36)/.installed
	PYTHONPATH=$(TRITON_36) $(BIN)/python $(COMPILE)

# On a machine with a GPU, without network: its own Python with torch, Triton and what the tests need
# (the training step also pydantic; without it that one is not measured).
# Writes bench/results/gpu.csv and plots, and fills the measured columns of docs/kernels.md, also
# where a test failed; the recipe fails then all the same. Tests go side by side where pytest-xdist is:
# most of their time is compilation.
gpu:
	side=$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8"); \
	  $(PYTHON) -m pytest $$side -m gpu tests/kernels tests/train/test_step_graph.py; status=$$?; \
	  $(PYTHON) -m bench.gpu && exit $$status

clean:
	rm -rf build *.egg-info spd_fast/*.so .pytest_cache .ruff_cache .mypy_cache
