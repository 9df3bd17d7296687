# `make demo` and `make test` need nothing but Python >= 3.11 and make their own environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

EXTRAS_VENV ?= .venv-extras
RAY_VENV ?= .venv-ray

.PHONY: install demo check test test-slow test-extras timm-table docs site dist

install: $(VENV)/.installed

# torch first, so that pip does not pick another build of it for a later package.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/tve-hf explain

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github

# A process for each core, each of one thread: many small tests, few large products.
test test-extras timm-table: export OMP_NUM_THREADS = 1

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# timm, DeepSpeed, Gradio and axe in an environment of their own: the package neither needs nor excludes them. Of
# torchvision, which timm asks for, the Python parts are enough, so the build need not fit torch:
# see tests/torchvision_ops.py.
$(EXTRAS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/pip install --quiet torch==2.13.0
	$(EXTRAS_VENV)/bin/pip install --quiet --editable '.[dev]'
	$(EXTRAS_VENV)/bin/pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31
	$(EXTRAS_VENV)/bin/pip install --quiet deepspeed==0.19.8
	$(EXTRAS_VENV)/bin/pip install --quiet gradio==6.31.0 selenium==4.51.0 tensorboard==2.21.0
	npm install --silent --prefix $(EXTRAS_VENV) axe-core@4.14.1
	touch $@

# Ray's workers are processes of its own, which would find that torchvision incomplete.
$(RAY_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/pip install --quiet torch==2.13.0
	$(RAY_VENV)/bin/pip install --quiet --editable '.[dev]' 'ray[data]==2.60.0'
	touch $@

test-extras: $(EXTRAS_VENV)/.installed $(RAY_VENV)/.installed
	$(EXTRAS_VENV)/bin/python -m pytest -n auto tests/classifiers/test_timm.py tests/classifiers/test_every_class.py -k timm
	$(EXTRAS_VENV)/bin/python -m pytest tests/test_readme.py -k 'python and your_model or shell and loops'
	$(EXTRAS_VENV)/bin/python -m pytest -m slow tests/pretrain/test_launch.py
	$(EXTRAS_VENV)/bin/python -m pytest -n auto --dist loadfile -m 'slow or not slow' \
		tests/examples/space tests/evaluation/test_callback.py tests/examples/test_train_timm.py
	$(RAY_VENV)/bin/python -m pytest -m 'slow or not slow' tests/examples/test_bulk_ray.py

timm-table: $(EXTRAS_VENV)/.installed
	$(EXTRAS_VENV)/bin/python tests/timm_families.py --output docs/timm.md

# Every code block of README, of the other documents and of the cards.
docs: install
	$(BIN)/python -m pytest tests/test_readme.py tests/hub/test_model_card.py tests/test_checkpoints.py

# The pages of docs/, with the references from docstrings and parsers: open build/site/index.html.
site: install
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env -d build/doctrees docs build/site

dist: install
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build
