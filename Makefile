# What README.md and docs/ name. PYTHON makes the virtual environment; ARGS are options of findings.py.
PYTHON ?= python3
BIN := .venv/bin
# Models this small are slower on more threads.
ONE := OMP_NUM_THREADS=1 $(BIN)/python

.DELETE_ON_ERROR:
.PHONY: setup demo test test-slow test-torchao test-gpu check compare analyze findings findings-page calibrate batch-demo serve-demo bench bench-gpu clean
demo test test-slow test-torchao test-gpu check compare analyze findings findings-page calibrate batch-demo serve-demo bench bench-gpu: setup
setup: .venv/.ready

# torch first and by its exact version, so that pip takes a CPU build that it has at hand.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; run make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo:          ; $(BIN)/python launch/demo.py
test:          ; $(ONE) -m pytest -n 4 --dist loadfile --no-loadscope-reorder
test-slow:     ; $(BIN)/python -m pytest -m slow
# In a folder of its own, because diffusers imports torchao in every process that can.
test-torchao:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/torchao "$$(grep '^torchao==' constraints.txt)"
	PYTHONPATH=.venv/torchao $(ONE) -m pytest tests/engine/load/test_quantised.py
test-gpu:      ; $(BIN)/python -m pytest -m gpu
check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# Small runs of the embedded model; their options are in configs/small/.
compare:       ; $(ONE) launch/compare.py --config tiny-wan --config configs/small/compare.yaml
analyze:       ; $(BIN)/python launch/analyze.py --config tiny-wan --config configs/small/analyze.yaml
serve-demo:    ; $(ONE) launch/serve.py --config tiny-wan --config configs/small/serve.yaml
batch-demo:
	$(ONE) launch/batch.py --config tiny-wan --config configs/small/batch.yaml
	$(ONE) launch/evaluate.py --runs runs/batch-demo

# The study of docs/findings.md, configs/study/findings.yaml: hours, unless its measures are kept.
findings:      ; $(BIN)/python launch/findings.py --make analysis,videos,steps $(ARGS)
findings-page: ; $(BIN)/python launch/findings.py $(ARGS)
calibrate:     ; $(BIN)/python launch/findings.py --make calibration $(ARGS)

# On a CPU, about eight minutes; on a GPU, less than nine.
bench:         ; $(BIN)/python -m benchmarks.every cpu
bench-gpu:     ; $(BIN)/python -m benchmarks.every gpu
clean:         ; rm -rf .venv build dist *.egg-info
