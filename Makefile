# gptoughts: `make pretrain` trains a model from nothing, `make test` checks everything. `make help` lists the rest.

PYTHON      ?= python3
TORCH_INDEX ?=
VENV        ?= .venv
BIN         := $(VENV)/bin

GPUS        := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
CORES       := $(shell nproc 2>/dev/null || echo 2)
REQUIREMENTS := requirements/$(if $(filter-out 0,$(GPUS)),gpu,cpu).txt
TORCH       := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements/cpu.txt)

# The main job; every value can be overridden: make pretrain SIZE=small STEPS=20000 RANKS=8
MODEL_TYPE  ?= mla
SIZE        ?= debug
STEPS       ?= 300
RANKS       ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
RUN         ?= runs/$(MODEL_TYPE)-$(SIZE)
DS_CONFIG   ?= ds_configs/zero3.json
PROMPT      ?= def read_lines(path):
ARGS        ?=
# Tests run in this many processes; each keeps pools of up to four ranks, about 6 GB in all.
TEST_WORKERS ?= 2
GPU_TEST_WORKERS ?= 4
PYTEST      = $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal
VOCAB_SIZE  ?= 8192
CORPUS      ?= data_cache/stdlib-$(VOCAB_SIZE)

# Ranks on one CPU share its cores; DeepSpeed finds its compiler helper (ninja) on PATH.
export OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) / $(RANKS) > 0 ? $(CORES) / $(RANKS) : 1 )))
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM ?= true

STDLIB      = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
INSTALLED   := $(VENV)/.installed
DEV         := $(VENV)/.installed-dev
TOKENIZER   := $(CORPUS)/tokenizer/tokenizer.json
DATA        := $(CORPUS)/python

.PHONY: help install corpus pretrain sample plot test test-all test-gpu parity check bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

$(INSTALLED): $(REQUIREMENTS) requirements/cpu.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BIN)/python tools/doctor.py --build_ops
	touch $@

$(DEV): $(INSTALLED) requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	touch $@

install: $(INSTALLED)  ## create .venv with exact versions and build DeepSpeed's CPU op

$(TOKENIZER): | $(INSTALLED)
	$(BIN)/python tools/train_tokenizer.py --input $(STDLIB) --suffix .py --vocab_size $(VOCAB_SIZE) --output $(CORPUS)/tokenizer

$(DATA)_train.idx $(DATA)_valid.idx &: $(TOKENIZER) | $(INSTALLED)
	$(BIN)/python tools/preprocess_data.py --input $(STDLIB) --suffix .py --tokenizer $(CORPUS)/tokenizer \
	  --output_prefix $(DATA) --append_eod --validation_fraction 0.01 --workers $(CORES)

corpus: $(DATA)_train.idx  ## tokenizer and indexed files of the default corpus (Python's standard library)

pretrain: $(INSTALLED) corpus  ## the main job: train, print a sample, draw the loss curve; run again to go on
	$(BIN)/deepspeed --log_level warning --num_accelerators $(RANKS) launchers/pretrain.py --model_type $(MODEL_TYPE) --size $(SIZE) \
	  --data $(DATA) --deepspeed_config $(DS_CONFIG) --output_dir $(RUN) --train.steps $(STEPS) $(ARGS)
	@$(MAKE) --no-print-directory sample

sample: $(INSTALLED)  ## continue PROMPT with the newest checkpoint of RUN
	$(BIN)/python launchers/generate.py --checkpoint $(RUN) --prompt "$(PROMPT)"

plot: $(INSTALLED)  ## draw the loss curve of RUN
	$(BIN)/python tools/plot_run.py $(RUN)

test-gpu: $(DEV)  ## what a GPU alone can show, on the first one of this machine
	TEST_GPU=1 CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest -q -n $(GPU_TEST_WORKERS) tests/gpu

test: $(DEV)  ## all tests but the slow ones
	$(PYTEST) -m "not slow"

test-all: $(DEV) parity  ## all tests
	$(PYTEST)

parity: $(DEV)  ## every layout of every family against one rank; goes on where it was stopped; ARGS="--shard 1/4"
	$(BIN)/python -m tests.parity.matrix $(ARGS)

check: $(DEV)  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)  ## side-by-side measurements against peers
	$(BIN)/python -m benchmarks

clean:  ## remove .venv, the default corpus and caches (runs stay)
	rm -rf $(VENV) data_cache .pytest_cache .mypy_cache .ruff_cache
