# make setup, make check, make test (test-slow, test-gpu); and make demo, the main job. Then compare, analyze, findings, calibrate, batch-demo, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: setup demo test check test-slow test-gpu compare analyze findings findings-page calibrate batch-demo bench bench-gpu clean

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

# A test file to a process, one thread each: models this small are slower on more, and some tests start ranks of their own.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What takes minutes: batches on a real Ray.
test-slow: setup
	$(BIN)/python -m pytest -m slow

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# A comparison in SHARDS processes of one thread each, which suits a small model better than threads: $(call in_shards,COMMAND).
SHARDS := 2
in_shards = pids=; for shard in $$(seq $(SHARDS)); do $(1) --shard $$shard/$(SHARDS) & pids="$$pids $$!"; done; \
	status=0; for pid in $$pids; do wait $$pid || status=$$?; done; exit $$status
# glibc would give large temporaries back to the system at every free and ask for them anew, which costs some 5 % of a CPU run; 32 MiB
# is the most that older versions take. Other C libraries do not read the two.
ONE_CORE := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2000000000
COMPARE := $(ONE_CORE) $(BIN)/python launch/compare.py --prompt_file configs/prompts/world-heldout-40.txt --output.progress off

# Small: a few prompts and steps. docs/compare.md has the commands of the full tables.
SMALL := $(COMPARE) --num_prompts 6 --sampler.num_steps 8 --out runs/compare-small
compare: setup
	$(call in_shards,$(SMALL))
	$(SMALL) --report_only

# 141 frames are four native lengths of the embedded model.
analyze: setup
	$(BIN)/python launch/analyze.py --method.name direct --video.num_frames 141 \
		--prompt_file configs/prompts/world-heldout-40.txt --num_prompts 6 --num_points 7 --sampler.num_steps 12 --out runs/analysis-small

# The tables of docs/findings.md. Stopped or killed, the same command goes on; and what KEPT has the measures of is not made again:
# elsewhere (KEPT, TABLES, SEARCH and PAGE) everything is, which takes hours. T-GR, the published row, is freespec itself.
# What is kept was made on a CPU, and videos of a GPU are no part of it: DEVICE goes with a KEPT of your own.
comma := ,
ROW = $(1)=freespec:configs/ablation/$(2).yaml
SIX := direct,sliding_window,freenoise,freelong,freepca,freespec
# The three that bring noise of their own, with the noise that the other three have: freenoise-iid, freelong-iid, freepca-iid.
IID := freenoise:configs/noise/iid.yaml,freelong:configs/noise/iid.yaml,freepca:configs/noise/iid.yaml
ROWS := $(call ROW,GB,gb),$(call ROW,LB-fixed,lb_fixed),$(call ROW,RA,ra),$(call ROW,TA,ta),$(call ROW,RA+TA,ra_ta),$(call ROW,F-GR,f_gr)
TABLES := runs/findings
SEARCH := runs/calibration
KEPT := docs/findings
PAGE := docs/findings.md
DEVICE := cpu
FINDINGS := $(COMPARE) --model.device $(DEVICE) --num_seeds 2 --measures $(KEPT)/videos.jsonl --out $(TABLES)
# What half of the steps change: the same prompts, one seed, and the methods of which the page speaks.
STEPS := $(COMPARE) --model.device $(DEVICE) --sampler.num_steps 10 --methods direct,sliding_window,freespec --measures $(KEPT)/steps.jsonl --out $(TABLES)/steps
is_made = test -e $(KEPT)/$(1).jsonl || test -e $(TABLES)/$(2)/comparison.json
findings: setup $(KEPT)/analysis/report.json
	$(call in_shards,$(FINDINGS) --methods $(SIX)$(comma)$(ROWS)$(comma)$(IID))
	$(call in_shards,$(STEPS))
	$(MAKE) findings-page

# The reports on what is made so far, and the page.
findings-page: setup
	if $(call is_made,videos,.); then $(FINDINGS) --methods $(SIX) --report_only --report_if_any --report $(TABLES)/methods; fi
	if $(call is_made,videos,.); then $(FINDINGS) --methods direct,sliding_window,$(IID),freespec --report_only --report_if_any --report $(TABLES)/noise; fi
	if $(call is_made,videos,.); then $(FINDINGS) --methods $(ROWS),freespec --baseline freespec --report_only --report_if_any --report $(TABLES)/ablation; fi
	if $(call is_made,steps,steps); then $(STEPS) --report_only --report_if_any; fi
	mkdir -p $(TABLES) $(KEPT)
	$(BIN)/python launch/findings.py --runs $(TABLES) --kept $(KEPT) --page $(PAGE)

$(KEPT)/analysis/report.json: | setup
	$(ONE_CORE) $(BIN)/python launch/analyze.py --model.device $(DEVICE) --method.name direct --video.num_frames 141 \
		--prompt_file configs/prompts/world-heldout-40.txt --num_prompts 20 --num_reconstructed 8 --out $(TABLES)/analysis --output.progress off
	mkdir -p $(@D) && cp $(TABLES)/analysis/rank-progress.png $(@D) && cp $(TABLES)/analysis/report.json $@

# FreeSpec's open settings, searched on one list of prompts and judged on the other; KEPT and DEVICE as above. A wider search goes on from
# this one: SEARCHED='--num_trials 24 --rounds 5,10,20 --num_judge_seeds 2'.
SEARCHED := --num_trials 12 --rounds 4,8 --num_judge_seeds 1
calibrate: setup
	$(ONE_CORE) $(BIN)/python launch/calibrate.py --prompt_file configs/prompts/world-calibration-20.txt \
		--judge_prompt_file configs/prompts/world-heldout-40.txt --model.device $(DEVICE) $(SEARCHED) \
		--measures $(KEPT)/calibration --out $(SEARCH) --output.progress off
	cp $(SEARCH)/report.json $(KEPT)/calibration/report.json
	$(MAKE) findings-page

# Twelve small videos on two replicas of a Ray of this machine, then their report; started again it makes only what is missing.
batch-demo: setup
	OMP_NUM_THREADS=1 $(BIN)/python launch/batch.py --ray local --replicas 2 --suite configs/prompts/batch-demo.txt \
		--methods direct,sliding_window,freespec --seeds 0,1 --video.num_frames 65 --sampler.num_steps 10 --out runs/batch-demo
	OMP_NUM_THREADS=1 $(BIN)/python launch/evaluate.py --runs runs/batch-demo

# On a CPU, less than five minutes; waiting threads are kept from counting as work.
bench: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.attention --shapes tiny ltx wan-short --repeats 2
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
