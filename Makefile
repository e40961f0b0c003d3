# Every target works in a fresh clone: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test lint docs pytest soak bench clean

install: $(READY)

# torch goes first and pinned: another package's range must not choose it.
$(READY): setup.py pyproject.toml constraints.txt accessory/kernels/native.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
