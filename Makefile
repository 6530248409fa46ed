# make precompute train eval: the pipeline. Variables: CONFIG, RUN, SET="train.beta=0.05 data.path=my pairs.jsonl".
CONFIG ?= pipeline/presets/demo.yaml
SET ?=
ROUNDS ?= 2
OBJECTIVE ?=
DEVICES ?= 1
MINUTES ?= 20
DATA ?= demo

refscore = .venv/bin/refscore
# as they were given, spaces, quotes, brackets and dollars too: not expanded here, and read by the shell from the environment
override CONFIG := $(value CONFIG)
override SET := $(value SET)
override OBJECTIVE := $(value OBJECTIVE)
export CONFIG SET OBJECTIVE
options = --config "$$CONFIG" $(if $(SET),--set "$$SET")
ifneq ($(origin RUN),undefined)
override RUN := $(value RUN)
export RUN
options += --run "$$RUN"
endif
declared = pyproject.toml $(wildcard requirements/*)

.DEFAULT_GOAL := help
.PHONY: help setup precompute plan train rollout eval sweep iterate test test-browser test-devices faults mutants check tutorials gpu-check bench bench-score bench-memory bench-memory-train bench-memory-host bench-train bench-store bench-plan bench-pairs bench-view bench-balance bench-statistics bench-trl bench-grpo frontier demo-data requirements docs clean architectures bench-tidy bench-many
# the stages build on one another: never side by side
.NOTPARALLEL:

help: ## this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  variables        CONFIG=$$CONFIG RUN=name (default: that of CONFIG) SET=\"section.field=value ...\""

setup: .venv/.run ## install what the stages need into .venv (the other targets do it by themselves)

precompute: .venv/.run ## stage 1: score chosen and rejected under the reference, once
	@$(refscore) precompute $(options)

plan: .venv/.run ## what stage 1 would score; loads no model
	@$(refscore) precompute --plan $(options)

train: .venv/.run ## stage 2: train the policy alone against the stored scores
	@$(refscore) train $(if $(filter-out 1,$(DEVICES)),--devices $(DEVICES)) $(options)

rollout: .venv/.run ## samples of the policy with rewards and scores, for SET="train.objective=policy_gradient"
	@$(refscore) rollout $(options)

eval: .venv/.run ## stage 3: generate, judge, report
	@$(refscore) eval $(options)

sweep: .venv/.run ## all stages for a grid: SET="train.beta=0.03,0.1,0.3"
	@$(refscore) sweep $(options)

iterate: .venv/.run ## ROUNDS=2 rounds of training, each on what the last one's policy wrote; OBJECTIVE=policy_gradient: samples
	@$(refscore) iterate --rounds $(ROUNDS) $(if $(OBJECTIVE),--set "train.objective=$$OBJECTIVE") $(options)

test: .venv/.test ## the tests, two at a time (real vLLM on CPU)
	@.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: .venv/.test ## refscore view in Chromium: what make test has of it, and every page in both schemes at both widths
	@REFSCORE_BROWSER=1 .venv/bin/python -m pytest tests/view tests/report/test_browser.py

check: .venv/.test ## lint and strict types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

tutorials: .venv/.test ## every tutorial of docs/tutorials, word for word, on a tiny model
	@REFSCORE_TUTORIALS=1 .venv/bin/python -m pytest tests/test_tutorials.py

test-devices: .venv/.test ## training in 1, 2 and 4 processes: every objective, resumed, killed (gloo on CPU); vLLM over two
	@REFSCORE_DEVICES=1 .venv/bin/python -m pytest tests/training/test_devices.py tests/faults/test_devices.py tests/planning/test_many_devices.py tests/engines/test_vllm_scorer.py

gpu-check: .venv/.test ## the first thing to run on a GPU: right numbers, memory, speed; reduced on a CPU; data/gpu-check.md
	@.venv/bin/python -m tests.gpu_check --minutes $(MINUTES)

faults: .venv/.test ## the fault tests alone, and actors of Ray that are killed; writes the table in tests/faults/README.md
	@REFSCORE_FAULTS=1 REFSCORE_WRITE_FAULT_TABLE=1 .venv/bin/python -m pytest tests/faults tests/rollouts/test_kills.py tests/precompute/test_ray.py tests/stages/test_quarantine.py

architectures: .venv/.test ## which families of models are read how; writes the table in tests/architectures.md
	@REFSCORE_WRITE_ARCHITECTURES=1 .venv/bin/python -m pytest tests/forward/test_architectures.py

mutants: .venv/.test ## small changes of the code that makes numbers: which does a test notice? FILE=training/objectives/losses for one file
	@.venv/bin/python -m tests.mutants $(FILE)

bench-memory-host: .venv/.test ## a billion weights in 1, 2 and 4 processes: memory of all together
	@.venv/bin/python -m tests.benchmarks.host_memory

bench-balance: .venv/.test ## how evenly tokens are shared out among processes; no model runs
	@.venv/bin/python -m tests.benchmarks.balance

bench-store: .venv/.test ## the store with two million sequences, or SEQUENCES=: plans, opening, a join, requests to S3
	@.venv/bin/python -m tests.benchmarks.store

bench-tidy: .venv/.test ## ls, verify, gc and compact on a store of two million sequences in a thousand shards
	@.venv/bin/python -m tests.benchmarks.tidying

bench-many: .venv/.test ## many scorers of one plan, one of them killed: every score once, peak memory of the driver
	@.venv/bin/python -m tests.benchmarks.many_scorers

bench-memory-train: .venv/.test ## peak memory of a training step, ours and TRL's, simulated for models of 1B and 8B
	@.venv/bin/python -m tests.benchmarks.memory_train

bench-memory-devices: .venv/.test ## the same on each of several devices, for models of 8B and 70B; and against two real processes
	@.venv/bin/python -m tests.benchmarks.memory_devices

bench-train: .venv/.test ## our trainer against TRL's: time of a step, peak memory
	@.venv/bin/python -m tests.benchmarks.training

bench-score: .venv/.test ## scoring against TRL's precompute and a plain loop, each in a fresh process
	@.venv/bin/python -m tests.benchmarks.scoring

bench-trl: .venv/.test ## TRL's DPOTrainer from stored scores against its own precomputation
	@.venv/bin/python -m tests.benchmarks.exchange

bench-grpo: .venv/.test ## TRL's GRPOTrainer and our policy gradient on the same stored samples
	@.venv/bin/python -m tests.benchmarks.grpo

bench-memory: .venv/.test ## peak memory of stage one against the number of rows
	@.venv/bin/python -m tests.benchmarks.memory

bench-plan: .venv/.test ## planning a million pairs: processor time, wall time, memory; with two processes; a second time
	@.venv/bin/python -m tests.benchmarks.planning --rows $(or $(ROWS),1000000) $(if $(SHORT),--short)

bench-pairs: .venv/.test ## a training's pairs, up to a million: time to open, memory per pair
	@.venv/bin/python -m tests.benchmarks.pairs

bench-view: .venv/.test ## pages of 100,000 samples and 300,000 judgements in Chromium: times, memory of the server
	@.venv/bin/python -m tests.benchmarks.view

bench-statistics: .venv/.test ## intervals and tests of stage three on simulated judges: promised against kept; under 10 minutes
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.statistics

frontier: .venv/.test ## reward against KL: DPO, IPO, SFT, shuffled labels, best of n; three seeds; writes docs/frontier.svg
	@.venv/bin/python -m tests.benchmarks.frontier

bench: .venv/.test ## speed and memory of scoring and training on the demo data
	@.venv/bin/python -m tests.benchmarks.stages

demo-data: .venv/.run ## remake the pairs of data/demo from their prompts (DATA=bad_rule or DATA=confirm: those)
	@.venv/bin/python -m stages.demo_data $(DATA)

requirements: .venv/.run ## compile requirements/*.txt from pyproject.toml again
	@requirements/compile

docs: .venv/.docs ## the pages of docs/ as a searchable site, in data/cache/site
	@.venv/bin/python docs/generate.py
	@.venv/bin/mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo data/cache/site/index.html

clean: ## remove .venv and everything made below data/ but the store of scores and the runs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache data/cache data/models

.venv/.run: $(declared)
	@requirements/install run
	@touch $@

.venv/.test: $(declared)
	@requirements/install test
	@touch .venv/.run $@

.venv/.docs: .venv/.run
	@.venv/bin/uv pip install --quiet --python .venv/bin/python --constraints requirements/docs.txt mkdocs-material
	@touch $@
