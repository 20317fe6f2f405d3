# make demo   creates the environment, runs every notebook on the bundled model, says where the pictures are
#             (notebook 07 trains a model for a minute there; MINUTES=5 gives it as long as it asks for)
# make test   style, tests, and every notebook from its first cell to its last
# make mindspore   the same model on MindSpore: its own environment (3.3 GB), parity with torch, one notebook (opt-in)
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

.PHONY: demo test fuzz notebooks environment clean mindspore
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

# Everything runs inside the folder: from here, Python could take it for the package of the same name.
mindspore: .venv-mindspore/ready
	cd mindspore && GLOG_v=3 OMP_NUM_THREADS=1 ../.venv-mindspore/bin/python -m pytest -q
	@mkdir -p runs/mindspore
	GLOG_v=3 OMP_NUM_THREADS=1 .venv-mindspore/bin/papermill --log-level ERROR --no-progress-bar --cwd mindspore \
		mindspore/image_to_image.ipynb runs/mindspore/image_to_image.ipynb
	@echo "done: the notebook with its images is runs/mindspore/image_to_image.ipynb"

.venv-mindspore/ready: mindspore/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "MindSpore needs Python 3.11 or 3.12; try: make mindspore PYTHON=python3.12")'
	$(PYTHON) -m venv .venv-mindspore
	.venv-mindspore/bin/python -m pip install --quiet --disable-pip-version-check -r mindspore/requirements.txt
	@touch $@

# Runs every notebook anew, in place. Look at the pictures before you commit them.
notebooks: environment
	$(BIN)/python docs/execute_notebooks.py

clean:
	rm -rf $(VENV) runs
