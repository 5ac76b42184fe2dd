# Everything from a fresh clone: python3 (3.10 or newer, with venv), a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
# Written when the package is installed; what compiled code and dependencies are made from makes it old.
INSTALLED := $(VENV)/.rftcore-installed

.PHONY: setup demo test test-all docs build clean

setup: $(INSTALLED)

# Editable: a plain install would be shadowed by the source folder here, and the tests would miss the compiled code.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[digits,tensorboard,test]"
	touch $@

# LoRA on the shipped digits pipeline against its reward, to the table of before and after.
demo: setup
	$(VENV)/bin/rftcore train draft --config digits_draft --output_dir runs/digits_draft-$$(date +%Y%m%d-%H%M%S)

# A process a core, each on a thread of its own; the tests of a file stay together, and share what it sets up. Files in
# conftest.py's order, the longest first.
PYTEST := $(VENV)/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# Also the tests marked slow.
test-all: setup
	RFTCORE_TEST_ALL=1 $(PYTEST)

# The documentation as a site, build/docs/index.html; a warning fails it.
docs: setup
	$(VENV)/bin/python -m sphinx -W --keep-going -n -q -b html docs build/docs

# A wheel in dist/, made as pip makes it: in an environment of its own.
build: setup
	$(VENV)/bin/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .hypothesis $(INSTALLED)
	find rftcore kernels python_tests -name __pycache__ -prune -exec rm -rf {} +
