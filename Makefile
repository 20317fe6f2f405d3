# make demo   creates the environment, runs every notebook on the bundled model, says where the pictures are
#             (notebook 07 trains a model for a minute there; MINUTES=5 gives it as long as it asks for)
# make test   style, tests, and every notebook from its first cell to its last
# make fuzz   a hundred times as many random inputs as `make test` tries (EXAMPLES=100000 for more yet)
PYTHON ?= python3
VENV   ?= .venv
DEMO   := runs/demo
MINUTES ?= 1
EXAMPLES ?= 10000
BIN    := $(VENV)/bin

# glibc gives large blocks back to the system after every operation; told to keep them, it runs diffusion faster.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456

.PHONY: demo test fuzz notebooks environment clean
.DEFAULT_GOAL := demo

environment: $(VENV)/ready

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "decinb needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: environment
	@mkdir -p $(DEMO)
	@for notebook in notebooks/*.ipynb; do \
		echo "running $$notebook"; \
		DECINB_MODEL=tiny DECINB_TRAIN_MINUTES=$(MINUTES) $(BIN)/papermill --log-level ERROR --no-progress-bar --cwd $(DEMO) \
			$$notebook $(DEMO)/$$(basename $$notebook) || exit 1; \
	done
	@echo "done: the notebooks with their pictures are in $(DEMO)/*.ipynb, the grids in $(DEMO)/*.png"

test: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

fuzz: environment
	DECINB_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -p no:nbval -o addopts= tests/guarantees/test_fuzz.py

# Runs every notebook anew, in place. Look at the pictures before you commit them.
notebooks: environment
	$(BIN)/python docs/execute_notebooks.py

clean:
	rm -rf $(VENV) runs
