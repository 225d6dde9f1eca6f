# make test | test-integrations | demo [DATA=path/to/ratings] | lint | format | clean
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
BUILD_INPUTS := pyproject.toml setup.py recgrela_ext/version.py \
	$(shell find build_backend csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Frameworks disagree on versions, so each is tried in an environment of its own.
STACKS := recbole rectools replay torchrec hub
STACK_ENV := build/integrations

.PHONY: test ctest demo lint format clean test-integrations test-distributed $(STACKS:%=test-%)

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

demo: $(INSTALLED)
	$(BIN)/python -m recgrela_ext.demo $(if $(DATA),--data "$(DATA)")

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build recgrela_ext/*.so *.egg-info

$(CREATED):
	$(PYTHON) -m venv $(VENV)

$(TORCH_READY): $(CREATED)
	$(PIP) install -q "$(TORCH)"
	@touch $@

$(INSTALLED): $(TORCH_READY) $(BUILD_INPUTS)
	$(PIP) install -q -e '.[test]'
	@touch $@

$(DEV_READY): $(INSTALLED)
	$(PIP) install -q -e '.[dev]'
	@touch $@
