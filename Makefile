# make test | test-integrations | demo [DATA=path/to/ratings] | gpu | lint | format | clean
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A stamp per state of the environment: a second `make` costs nothing. An installed torch stays.
CREATED := $(VENV)/pyvenv.cfg
TORCH_READY := $(VENV)/stamp-$(subst =,-,$(TORCH))
INSTALLED := $(VENV)/stamp-installed
DEV_READY := $(VENV)/stamp-dev
TOOLS := build/tools
# With PINNED=1, as in CI, only files known by their hash are taken. But for torch: which file that is
# depends on the index.
PINS := $(if $(PINNED),$(PIP) install -q --require-hashes --no-deps -r .ci/requirements.txt,@true)
BUILD_INPUTS := pyproject.toml setup.py recgrela_ext/version.py \
	$(shell find build_backend csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Frameworks disagree on versions, so each is tried in an environment of its own.
STACKS := recbole rectools replay torchrec hub
STACK_ENV := build/integrations

.PHONY: fuzz matrix audit sbom pins test ctest demo lint format clean gpu gpu-ready gpu-build gpu-test gpu-sanitize gpu-bench \
	test-integrations test-distributed $(STACKS:%=test-%)

test: $(INSTALLED) ctest
	$(BIN)/python -m pytest

ctest: $(INSTALLED)
	@if command -v cmake >/dev/null; then export MAKEFLAGS=; \
	  cmake -S . -B build/cmake -DPython3_EXECUTABLE=$(abspath $(BIN))/python -DRECGRELA_CUDA=OFF >/dev/null && \
	  cmake --build build/cmake -j 2 && \
	  ctest --test-dir build/cmake --output-on-failure; \
	else echo "cmake was not found: the C++ tests are left out"; fi

test-integrations: $(STACKS:%=test-%) test-distributed

# Twice: with the compiled operators and without.
$(STACKS:%=test-%): test-%: $(STACK_ENV)/%/stamp
	PYTHONPATH=. $(STACK_ENV)/$*/bin/python tests/integrations/run_stack.py $*
	RECGRELA_DISABLE_EXTENSION=1 PYTHONPATH=. $(STACK_ENV)/$*/bin/python tests/integrations/run_stack.py $*

test-distributed: $(INSTALLED)
	$(BIN)/python tests/integrations/run_stack.py distributed
	RECGRELA_DISABLE_EXTENSION=1 $(BIN)/python tests/integrations/run_stack.py distributed

$(STACK_ENV)/%/stamp: $(INSTALLED)
	$(PYTHON) -m venv $(STACK_ENV)/$*
	$(BIN)/python tests/integrations/install_stack.py $* $(STACK_ENV)/$*/bin/python "$(TORCH)"
	@touch $@

# Coverage-guided where atheris is installed (pip install atheris), else random edits.
RUNS ?= 1000000
SECONDS ?= 60
FUZZ_TARGETS ?= readers states models stores checkpoints resumes published frames requests operators
fuzz: $(INSTALLED)
	$(PIP) install -q -e '.[service]'
	for target in $(FUZZ_TARGETS); do $(BIN)/python -m tests.fuzz $$target --runs $(RUNS) \
	  --seconds $(SECONDS) --results build/fuzz $$($(BIN)/python -c 'import importlib.util as u; \
	  print("" if u.find_spec("atheris") else "--random")') || exit 1; done

# A wheel per Python, the operator suite on each torch; downloads every torch there is.
matrix: $(TOOLS)/stamp $(INSTALLED)
	$(BIN)/python -m tests.matrix $(MATRIX)

# What is installed, checked against known weaknesses: fails as well where a package could not be
# looked up. Then its list.
$(TOOLS)/stamp: .ci/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q --require-hashes -r .ci/tools.txt
	@touch $@
audit: $(TOOLS)/stamp $(INSTALLED)
	$(PIP) freeze --exclude-editable | sed 's/+.*//' >build/installed.txt
	$(TOOLS)/bin/pip-audit --strict -r build/installed.txt --no-deps --disable-pip
sbom: $(TOOLS)/stamp $(INSTALLED)
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml -o build/sbom.json $(BIN)/python

# The versions and hashes that CI installs, anew.
LOCK := $(TOOLS)/bin/uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header \
	--no-annotate --upgrade
pins: $(TOOLS)/stamp
	echo torch >build/excluded.txt
	$(LOCK) --excludes build/excluded.txt --extra dev --extra service pyproject.toml \
	  -o .ci/requirements.txt
	$(LOCK) .ci/tools.in -o .ci/tools.txt

demo: $(INSTALLED)
	$(BIN)/python -m recgrela_ext.demo $(if $(DATA),--data "$(DATA)")

# All a GPU is needed for, in one command, with the torch of $(PYTHON) and without a network:
#   make gpu PYTHON=python3          (needs nvcc, setuptools, pybind11, ninja, pytest, hypothesis)
# The library is built for the GPU at hand, in place. `make -k gpu` goes on after a part that failed.
gpu: gpu-build gpu-test gpu-sanitize gpu-bench
gpu gpu-test gpu-sanitize gpu-bench: export RECGRELA_CUDA_KERNELS = 1

gpu-ready:
	@$(PYTHON) -c 'import importlib.util as u, sys; \
	sys.exit("make gpu: $(PYTHON) has no torch") if u.find_spec("torch") is None else None; \
	import torch; \
	sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no CUDA device")'

gpu-build: gpu-ready
	RECGRELA_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) -c 'import torch; \
	print("%d.%d" % torch.cuda.get_device_capability())')} $(PYTHON) setup.py build_ext --inplace

gpu-test: gpu-ready
	RECGRELA_REQUIRE_GPU=1 $(PYTHON) -m pytest -m gpu tests/gpu

# Exact allocations, so that a byte past a tensor's end is seen. Every kind of kernel: units within a
# warp, shared by a block, on tensor cores, generic.
SANITIZE := --error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/gpu/test_agreement.py -k
SANITIZED := (test_modes or test_steps) and 16-torch.float32 or test_modes and (packed-64-torch or packed-128-torch)
gpu-sanitize: gpu-ready
	@command -v compute-sanitizer >/dev/null || { echo "make gpu: compute-sanitizer was not found"; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 RECGRELA_REQUIRE_GPU=1 compute-sanitizer --tool memcheck \
	  $(SANITIZE) "malformed or 16-padded-torch.float32 or $(SANITIZED)"
	RECGRELA_REQUIRE_GPU=1 compute-sanitizer --tool racecheck \
	  $(SANITIZE) "$(SANITIZED)"

gpu-bench: gpu-ready
	$(PYTHON) -m benchmarks cuda
	$(PYTHON) -m benchmarks readme

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build recgrela_ext/*.so *.egg-info

$(CREATED):
	$(PYTHON) -m venv $(VENV)

$(TORCH_READY): $(CREATED)
	$(PIP) install -q "$(TORCH)"
	@touch $@

$(INSTALLED): $(TORCH_READY) $(BUILD_INPUTS) $(wildcard .ci/requirements.txt)
	$(PINS)
	$(PIP) install -q -e '.[test]'
	@touch $@

$(DEV_READY): $(INSTALLED)
	$(PIP) install -q -e '.[dev]'
	@touch $@
