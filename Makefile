# make demo           create the environment, run every notebook on the bundled model, and say where the results are
#                     (notebook 07 trains a model for half a minute; MINUTES=5 gives it the full five;
#                     04 and 06 repeat their measurements less often)
# make lab            open the notebooks in JupyterLab
# make quick          style and the fast tests
# make test           style, all tests, and every notebook (WORKERS=1 for one process instead of up to four)
# make classic        a second Jupyter with the versions of Colab, for the browser tests (200 MB; torch is shared)
# make fuzz           a hundred times as many random inputs and hostile files as `make test` (EXAMPLES=100000 for more)
# make notebooks      run every notebook again, in place; look at the images before you commit them
# make gpu            on a machine with CUDA, everything that waits for a GPU, in at most 20 minutes; else say what it would do
# make stamp          write the set-up cell and the project's address into the notebooks and docs
# make wheel          build the package, with the notebooks inside, into dist/
# make site           the notebooks and the documentation as pages with a search, in runs/site/html
# make slides         slides made from the notebooks, in runs/slides
# make mindspore      the same model on MindSpore, opt-in: its own environment (3.3 GB), parity with torch, one notebook
# make architecture   draw the picture in docs/architecture.md, update its table, and draw the maps of the notebooks
PYTHON ?= python3
VENV   ?= .venv
MINUTES ?= 0.5
EXAMPLES ?= 10000
WORKERS ?= 4
BIN    := $(VENV)/bin

# By default, glibc returns large blocks to the system after every operation. Keeping them makes diffusion faster.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456

# At most WORKERS processes, which share the cores. All tests of a file, and all cells of a notebook, run in one of them.
# The notebooks take longest and come first, so that no process waits for one of them at the end.
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

QUICK  := $(addprefix tests/,core sampling execution figures utils scenes)

.PHONY: demo lab stamp wheel quick test classic style fuzz gpu notebooks site slides mindspore architecture environment clean
.DEFAULT_GOAL := demo

environment: $(VENV)/ready

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "decinb needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: environment
	@DECINB_TRAIN_MINUTES=$(MINUTES) $(BIN)/python -W ignore tools/run_demo.py

lab: environment
	$(BIN)/jupyter lab --KernelManager.transport_encryption=auto notebooks

stamp: environment
	$(BIN)/python -m tools.stamp

wheel: environment
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

# Threads that wait for work sleep, so that they do not take the cores from other processes.
quick test fuzz: export OMP_WAIT_POLICY ?= PASSIVE

# Another number of threads rounds sums differently, and the tests compare images exactly.
quick test fuzz: export DECINB_FIXED_THREADS ?= 1

# The notebooks import torch before decinb, which would otherwise set this itself: see decinb/utils/threads.py.
demo notebooks: export GOMP_SPINCOUNT ?= 30000

style: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: style
	$(PYTEST) -m "not slow and not browser and not cuda" $(QUICK)

test: style
	$(PYTEST)

classic: .venv-classic/ready

# Its packages come first, then those of the first environment.
.venv-classic/ready: tests/interactive/classic.txt $(VENV)/ready
	$(PYTHON) -m venv .venv-classic
	.venv-classic/bin/python -m pip install --quiet --disable-pip-version-check -r tests/interactive/classic.txt
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-classic/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_first_environment.pth
	@touch $@

fuzz: environment
	DECINB_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q tests/guarantees/test_fuzz.py tests/guarantees/test_proofs.py tests/guarantees/test_hostile.py \
		tests/execution/test_modes.py

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

# With a GPU, the installed torch is used, and only what is missing is installed.
GPU_VENV := $(if $(shell command -v nvidia-smi),.venv-gpu,$(VENV))

gpu: $(GPU_VENV)/ready
	$(GPU_VENV)/bin/python -m tools.run_gpu

.venv-gpu/ready: pyproject.toml
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

notebooks: environment
	$(BIN)/python tools/execute_notebooks.py

site: environment
	$(BIN)/python -m tools.make_site

slides: environment
	$(BIN)/python -m tools.make_slides

architecture: environment
	$(BIN)/python -m tools.draw_architecture
	$(BIN)/python -m tools.draw_map

clean:
	rm -rf $(VENV) .venv-classic .venv-gpu .venv-mindspore runs
