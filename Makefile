# Two commands do everything on a fresh machine with Python 3.11+: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-integrations check docs bench clean

train: $(VENV)/.train  ## set up, run the main job, show it learn (about three minutes on two cores)
	$(RUN) train.py configs/chain_sum.py

test: $(VENV)/.test  ## every test, on 8 virtual CPU devices
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Two environments, as TRL and Tunix want other versions of the same packages. On Linux pip's torch is several gigabytes
# with CUDA; PIP_INDEX_URL=https://download.pytorch.org/whl/cpu with PIP_EXTRA_INDEX_URL=https://pypi.org/simple is less.
test-integrations: $(VENV)-trl/.made $(VENV)-tunix/.made  ## the allocator inside the real TRL and Tunix (nine minutes of processor time, with the environments)
	$(VENV)-trl/bin/python -m pytest --confcutdir=tests/integrations tests/integrations/test_trl.py
	$(VENV)-tunix/bin/python -m pytest --confcutdir=tests/integrations tests/integrations/test_tunix.py

check: $(VENV)/.check docs  ## format, lint, types, the documents as a site, the notebook that trains
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(RUN) -m tests.notebooks docs/notebooks/small_run.ipynb --quick

docs: $(VENV)/.check  ## the documents as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

bench: $(VENV)/.train  ## the first figures of docs/results.md (hours)
	$(RUN) benchmarks/sample_efficiency.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cero_jax needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -q -e '.[train]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -q -e '.[test]'
	@touch $(VENV)/.train $@

$(VENV)/.check: pyproject.toml | $(VENV)/bin/python  # all at once, which takes pip less time than one after the other
	$(RUN) -m pip install -q -e '.[test,check]'
	@touch $(VENV)/.train $(VENV)/.test $@

$(VENV)-trl/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install -q -e . torch==2.13.0 trl==1.16.0 pytest
	@touch $@

$(VENV)-tunix/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tunix
	$(VENV)-tunix/bin/python -m pip install -q -e . google-tunix==0.1.7 pytest
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-trl $(VENV)-tunix runs site
