# make setup, make check, make test (test-slow, test-gpu); and make demo, the main job. Then compare, analyze, findings, calibrate, batch-demo, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: setup demo test check test-slow test-gpu compare analyze findings findings-page calibrate batch-demo serve-demo bench bench-gpu clean

setup: $(VENV)/.ready

# torch comes first and by its exact version: a pip that has a CPU build at hand takes that one.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python launch/demo.py

# A test file to a process, one thread each: models this small are slower on more, and some tests start ranks of their own or wait.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# What takes minutes or a browser: batches on a real Ray, pages of comparisons and of serve.py in Chromium (apt-get install chromium).
test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# Small: a few prompts and steps; compare on two replicas of one thread each. docs/compare.md has the commands of the full tables.
compare: setup
	OMP_NUM_THREADS=1 $(BIN)/python launch/compare.py --prompts configs/prompts/world-heldout-40.txt --num_prompts 6 --replicas 2 \
		--output.progress off --sampler.num_steps 8 --out runs/compare-small

# 141 frames are four native lengths of the embedded model.
analyze: setup
	$(BIN)/python launch/analyze.py --method.name direct --video.num_frames 141 --prompts configs/prompts/world-heldout-40.txt --num_prompts 6 \
		--num_points 7 --sampler.num_steps 12 --out runs/analysis-small

# The study of docs/findings.md, configs/study/findings.yaml; ARGS are further options of launch/findings.py. Stopped or killed, the same
# command goes on; what --kept has the measures of is not made again: elsewhere everything is, which takes hours.
findings: setup
	$(BIN)/python launch/findings.py --make analysis,videos,steps $(ARGS)

findings-page: setup
	$(BIN)/python launch/findings.py $(ARGS)

calibrate: setup
	$(BIN)/python launch/findings.py --make calibration $(ARGS)

# Twelve small videos on two replicas of a Ray of this machine, then their report; started again it makes only what is missing.
batch-demo: setup
	OMP_NUM_THREADS=1 $(BIN)/python launch/batch.py --ray local --replicas 2 --prompts configs/prompts/batch-demo.txt \
		--methods direct,sliding_window,freespec --seeds 0,1 --video.num_frames 65 --sampler.num_steps 10 --out runs/batch-demo
	OMP_NUM_THREADS=1 $(BIN)/python launch/evaluate.py --runs runs/batch-demo

# The service with three videos of the embedded model, which take a minute, and the address of its page; Ctrl-C ends it.
serve-demo: setup
	OMP_NUM_THREADS=1 $(BIN)/python launch/serve.py --prompts configs/prompts/serve-demo.txt --video.num_frames 65 --sampler.num_steps 8 \
		--preview_every 1 --folder runs/serve-demo

# On a CPU, less than five minutes; waiting threads are kept from counting as work.
bench: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.attention --shapes tiny ltx wan-short --repeats 2
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.far --shapes tiny wan-short --repeats 1
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.fusion --shapes tiny wan-short --no-dual wan-short --repeats 9
	$(BIN)/python -m benchmarks.parallel --shapes tiny --repeats 3
	$(BIN)/python -m benchmarks.memory
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.timeline --repeats 3
	$(BIN)/python -m benchmarks.report

# On a GPU, less than nine minutes, without a network.
bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu; status=$$?; $(BIN)/python -m benchmarks.report && exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info
