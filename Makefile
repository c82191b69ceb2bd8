# Every target sets up what it needs: .venv with the package, at the versions of constraints.txt. A second call installs nothing.
#
#   make sweep [CHECKPOINT=…] [IMAGE=…] [SIZES="[[448, 448]]"] [RECIPES="transformers, baseline"] [PARAMETERS="-p repeats 20"]
#   make test  [TESTS=tests/test_recipe.py]
#   make lab
#   make lint
#   make figures [MEASURE=--measure]

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTS  ?= tests
RUN    := $(or $(RUN),runs/$(shell date +%Y%m%d-%H%M%S))

.PHONY: sweep test lab lint figures
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is no Python 3.11 to 3.13; call make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebooks,dev]'
	@touch $@

sweep: $(STAMP)
	@mkdir -p $(RUN)
	$(BIN)/papermill notebooks/ttft_sweep.ipynb $(RUN)/ttft_sweep.ipynb --kernel python3 -p output_dir $(RUN) \
		$(if $(CHECKPOINT),-y "checkpoints: ['$(CHECKPOINT)']") $(if $(IMAGE),-r image "$(IMAGE)") \
		$(if $(SIZES),-y "image_sizes: $(SIZES)") $(if $(RECIPES),-y "recipes: [$(RECIPES)]") $(PARAMETERS)
	@$(BIN)/python -m fastvl_lab.view $(RUN)

test: $(STAMP)
	$(BIN)/python -m pytest $(TESTS)

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks/workbench.ipynb

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify --keep-id --extra-keys "cell.metadata.papermill metadata.papermill" notebooks/*.ipynb

figures: $(STAMP)
	$(BIN)/python figures/draw.py $(MEASURE)
