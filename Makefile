# `make` lists the commands. Each one sets up .venv by itself, once;
# with PY=python3 it uses that interpreter as it is, and installs nothing.

PYTHON ?= python3
PORT ?= 8888
EXAMPLES ?= 2000
TOOL ?= memcheck
JOBS ?= 8
CHAPTER_00 := $(firstword $(wildcard notebooks/00_*.ipynb))
NBVAL := --nbval-lax --nbval-current-env

ifdef PY
READY :=
RUN := $(PY)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
READY := .venv/.ready
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

# Without a display, or with BROWSER=none, JupyterLab prints its address and opens nothing.
CAN_SHOW := $(if $(filter none,$(BROWSER)),,$(DISPLAY)$(WAYLAND_DISPLAY)$(BROWSER)$(filter Darwin,$(shell uname)))
LAB := --ServerApp.root_dir='$(CURDIR)' --LabApp.default_url='/lab/tree/$(CHAPTER_00)' \
	--ServerApp.port=$(PORT) --ServerApp.log_level=ERROR --LabApp.log_level=ERROR \
	$(if $(CAN_SHOW),,--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab test fuzz train check notebooks-gpu test-gpu sanitize gpu
.DEFAULT_GOAL := help

help:  ## list these commands
	@echo 'flash_edu: FlashAttention, from the formula to a fused Triton kernel you can import.'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' Makefile | awk -F@ '{printf "%-22s%s\n", $$1, $$2}'
	@echo
	@echo 'Settings: PYTHON=python3.12 makes .venv with that interpreter; PY=python3 uses one as it is, without .venv.'

lab: $(READY)  ## open the course in JupyterLab, on chapter 00 (PORT=8888, BROWSER=firefox or none)
	@echo 'Starting JupyterLab. Stop it with Ctrl-C.'
	@$(RUN) -m jupyterlab $(LAB)

test: $(READY)  ## run every test and every notebook that needs no GPU
	@CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m 'not gpu' \
		-n 2 --dist loadfile --no-loadscope-reorder $(NBVAL) --nbval-cell-timeout=180 tests notebooks

fuzz: $(READY)  ## random requests against the formula in float64, on the GPU if there is one (EXAMPLES=2000, SEED=7)
	@EXAMPLES=$(EXAMPLES) $(RUN) -m pytest -q tests/package/test_fuzz.py $(if $(SEED),--hypothesis-seed=$(SEED))

train: $(READY)  ## train a small GPT whose attention is flash_edu
	@$(RUN) -m flash_edu.training

check: $(READY)  ## judge your answers to one chapter: make check CH=4
	@test -n '$(CH)' || { echo 'Which chapter? For example: make check CH=4'; exit 2; }
	@$(RUN) -m flash_edu.course.cli check $(CH)

test-gpu: gpu  ## run the tests of the package and of the chapters on this machine's GPU
	@$(RUN) -m pytest -q tests/chapters tests/package

sanitize: gpu  ## compute-sanitizer over every branch of the kernels (TOOL=memcheck, racecheck, initcheck or synccheck; JOBS=8 at a time)
	@seq 0 $$(($(JOBS) - 1)) | PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -P $(JOBS) -I{} \
		compute-sanitizer --tool $(TOOL) --error-exitcode 1 $(RUN) tests/package/every_branch.py {} $(JOBS)

notebooks-gpu: gpu  ## run every notebook on this machine's GPU and store its outputs (TAR=FILE: copies in one file)
	@$(RUN) -m flash_edu.course.notebooks $(if $(TAR),--tar '$(TAR)') notebooks/*.ipynb
	@$(RUN) -m pytest -q $(NBVAL) --nbval-cell-timeout=300 notebooks

gpu: $(READY)
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "This command needs a CUDA GPU, and torch sees none here.")'

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo 'flash_edu needs Python 3.10, 3.11, 3.12 or 3.13, and $(PYTHON) is' \
			"$$($(PYTHON) --version 2>/dev/null || echo 'not installed here')."; \
		echo 'Install one of these, then name it: make $(MAKECMDGOALS) PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo '$(PYTHON) is here without its venv module, which makes .venv.'; \
		echo 'On Debian and Ubuntu: sudo apt-get install python3-venv. Then run make $(MAKECMDGOALS) again.'; exit 1; }
	@echo 'Setting up .venv, once: PyTorch is a large download, so this takes some minutes.'
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --disable-pip-version-check -e '.[course,transformers,dev]' -c constraints.txt
	@$(RUN) -m jupyter labextension disable '@jupyterlab/apputils-extension:announcements' 2>/dev/null  # asks each new user about news
	@touch $@
