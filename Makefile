# Every target sets up what it needs: .venv with the package, at the versions of constraints.txt. A second call installs nothing.
#
#   make sweep [CHECKPOINT=folder-or-id] [IMAGE=photo.jpg] [SIZES='[[448, 448]]'] [RUN=folder] [PARAMETERS='-p repeats 20']
#              [RECIPES='["transformers", "fastest, vit.tower=transformers"]'] [WORKERS=2]
#   make test  [TESTS=tests/test_recipe.py]
#   make test-native  (every launch setting of every kernel, compiled for GPUs from Ampere to Blackwell)
#   make test-nightly (those, and cases that take minutes beside one that `make test` runs)
#   make test-oldest  (what rests on torch, triton and Transformers, on the oldest versions allowed; Python 3.11 or 3.12, 6 GB)
#   make check-regression BASE=runs/before [HEAD=runs/after] [BOUND=1.05]  (fails on what became slower; without HEAD it is measured)
#   make test-clients (clients and load tools of other hands ask the server and measure it, from an environment of their own: 7 GB)
#   make benchmark    (the bars that speed-ups are held to; on an idle machine)
#   make workbench [WORKBENCH='--checkpoint tiny-qwen3-vl --image photo.jpg']  (the panel as a page of its own)
#   make lab          (JupyterLab on the workbench)
#   make lint
#   make figures [MEASURE=--measure]
#   make toggles      (docs/toggles.md and docs/flags.md, from the catalogue and what other engines have)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LIMITS ?= constraints.txt
STAMP  := $(VENV)/.installed
TESTS  ?= tests

# Parameters are taken from the command line alone: an IMAGE or RUN that happens to be in the environment is somebody else's.
given  = $(if $(findstring command,$(origin $1)),$($1))
quote  = '$(subst ','\'',$1)'
FOLDER := $(or $(call given,RUN),runs/$(shell date +%Y%m%d-%H%M%S))

.PHONY: sweep workbench test test-native test-nightly test-oldest clients test-clients check-regression benchmark lab lint figures toggles
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml $(LIMITS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is no Python 3.11 to 3.13; call make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LIMITS) --editable '.[notebooks,dev]'
	@touch $@

sweep: $(STAMP)
	@mkdir -p $(call quote,$(FOLDER))
	@$(BIN)/papermill notebooks/ttft_sweep.ipynb $(call quote,$(FOLDER)/ttft_sweep.ipynb) --kernel python3 \
		-r output_dir $(call quote,$(FOLDER)) \
		$(if $(call given,CHECKPOINT),-y $(call quote,checkpoints: ["$(CHECKPOINT)"])) \
		$(if $(call given,IMAGE),-r image $(call quote,$(IMAGE))) \
		$(if $(call given,SIZES),-y $(call quote,image_sizes: $(SIZES))) \
		$(if $(call given,RECIPES),-y $(call quote,recipes: $(RECIPES))) \
		$(if $(call given,WORKERS),-r launcher local -y $(call quote,workers: $(WORKERS))) $(call given,PARAMETERS)
	@$(BIN)/python -m fastvl_lab.view $(call quote,$(FOLDER))

# Tests start the package some thirty times: what Python has compiled of it and of the tests is kept, whatever is said outside.
test test-native test-nightly: export PYTHONDONTWRITEBYTECODE =

# First what can share the machine, a test a core; then what reads clocks. pytest's exit 5 is "none of these here".
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -n auto --dist worksteal -m "not alone and not native and not nightly and not benchmark" || [ $$? -eq 5 ]
	$(BIN)/python -m pytest $(TESTS) -m "alone and not nightly and not benchmark" || [ $$? -eq 5 ]

# All launch settings of all kernels, for GPUs from Ampere to Blackwell: minutes of compiling.
test-native: $(STAMP)
	$(BIN)/python -m pytest tests/kernels -n auto -m native

test-nightly: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -n auto --dist worksteal -m "(native or nightly) and not alone"
	$(BIN)/python -m pytest $(TESTS) -m "nightly and alone"

OLDEST := kernels capture decoder vit cache test_parity.py
test-oldest:
	$(MAKE) test VENV=.venv-oldest LIMITS=constraints-oldest.txt TESTS='$(addprefix tests/,$(OLDEST))'

# make's own status is 2 for any failure, and its last line has the program's: Error 1 is slower, Error 2 cannot be compared.
check-regression: $(STAMP)
	@$(BIN)/python -m fastvl_lab.measure.regressions $(call quote,$(call given,BASE)) \
		$(if $(call given,HEAD),$(call quote,$(call given,HEAD))) $(if $(call given,BOUND),--bound $(call quote,$(call given,BOUND)))

CLIENTS := .venv-clients
clients: $(CLIENTS)/.installed
$(CLIENTS)/.installed: Makefile
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check \
		'openai>=3.57,<4' 'litellm>=1.110,<2' 'langchain-openai>=1.7,<2' 'aiperf>=0.13,<0.14' 'guidellm>=0.8.1,<0.9' 'schemathesis>=4.32,<5'
	@touch $@

test-clients: $(STAMP) $(CLIENTS)/.installed
	FASTVL_LAB_CLIENTS=$(CLIENTS)/bin/python $(BIN)/python -m pytest tests/serve -m client

benchmark: $(STAMP)
	$(BIN)/python -m pytest $(TESTS) -m benchmark -rP

workbench: $(STAMP)
	@$(BIN)/python -m fastvl_lab.view.workbench $(call given,WORKBENCH)

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks/workbench.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify --keep-id --extra-keys "cell.metadata.papermill metadata.papermill" notebooks/*.ipynb

figures: $(STAMP)
	$(BIN)/python figures/draw.py $(MEASURE)

toggles: $(STAMP)
	$(BIN)/python -c 'from fastvl_lab.catalogue import catalogue_markdown; print(catalogue_markdown())' > docs/toggles.md
	$(BIN)/python -c 'from fastvl_lab.equivalents import flags_markdown; print(flags_markdown())' > docs/flags.md
