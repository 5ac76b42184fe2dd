# Everything from a fresh clone: python3 (3.10 or newer, with venv), a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
# Written when the package is installed; what compiled code and dependencies are made from makes it old.
INSTALLED := $(VENV)/.rftcore-installed

.PHONY: setup demo test test-all docs lint types mutants build wheel-check clean fuzz

setup: $(INSTALLED)

# Editable: a plain install would be shadowed by the source folder here, and the tests would miss the compiled code.
# Bytecode is made on all cores, where pip takes one; some packages ship files that no Python compiles.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[digits,tensorboard,test]"
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

# What looks at the code, and what builds it for others.
CODE := rftcore kernels python_tests benchmarks examples docs fuzz .ci
DEVELOPED := $(VENV)/.rftcore-developed
$(DEVELOPED): $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# LoRA on the shipped digits pipeline against its reward, to the table of before and after.
demo: setup
	$(VENV)/bin/rftcore train draft --config digits_draft --output_dir runs/digits_draft-$$(date +%Y%m%d-%H%M%S)

# A process a core, each on a thread of its own; the tests of a file stay together, and share what it sets up. Files in
# conftest.py's order: first what others wait for.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# Also the tests marked slow.
test-all: setup
	RFTCORE_TEST_ALL=1 $(PYTEST)

# The documentation as a site, build/docs/index.html; a warning fails it.
docs: setup
	$(VENV)/bin/python -m sphinx -W --keep-going -n -q -b html docs build/docs

# Style: rules and format are in pyproject.toml.
lint: $(DEVELOPED)
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)

types: $(DEVELOPED)
	$(VENV)/bin/mypy

# How many of a seeded sample of changes to ops, sampling and losses the tests notice. Stopped, it goes on the next time.
mutants: $(DEVELOPED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.mutants

# An sdist and a wheel in dist/, each made in an environment of its own, the wheel of the sdist.
build: $(DEVELOPED)
	$(VENV)/bin/python -m build

# The same without nvcc, installed into an environment of its own and used elsewhere.
wheel-check: $(DEVELOPED)
	.ci/wheel-check $(VENV)/bin/python

# What reads files and configs, against inputs that coverage guides: five minutes of each target, and what it found.
fuzz: setup
	$(VENV)/bin/python -m pip install --quiet "atheris>=3"
	$(VENV)/bin/python -m fuzz

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(INSTALLED) $(DEVELOPED)
	find rftcore kernels python_tests -name __pycache__ -prune -exec rm -rf {} +
