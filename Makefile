# Two commands: `make demo` runs the main job, `make test` checks everything. Both set themselves up.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CONSTRAINTS ?= constraints.txt

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Where this is set, each process that a test starts compiles the whole package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test tests test-quantised test-oldest test-newest check style types docs fuzz kill damage audit format bench clean

demo: $(READY)
	$(BIN)/forgetless demo --out runs

# The types, which take one process half a minute, are checked beside the tests.
test: style
	$(MAKE) --jobs 2 types tests

# One process more than two cores: many tests wait for others, or for a time to pass.
tests: $(READY)
	$(BIN)/python -m pytest -n 3 --dist worksteal

# The tests of quantised bases, which skip elsewhere: their two packages make every import of
# transformers and peft seconds slower and noisy, so they get an environment of their own.
test-quantised:
	$(MAKE) VENV=.venv-quantised EXTRAS=dev,quantised .venv-quantised/.ready
	.venv-quantised/bin/python -m pytest tests/adapters/test_bases.py tests/adapters/test_rounding.py \
	  tests/studies/test_quantised.py tests/cli/test_sharing.py -k 'not sharing or 4_bits'

# What touches the libraries most, with the oldest releases that pyproject.toml allows and with the
# newest. torch is the same in both: of others the index has builds for GPUs alone, of gigabytes.
# A warning is no error here: another release warns of other things.
AT_THE_ENDS := tests/adapters/test_attachment.py tests/adapters/test_folders.py \
  tests/adapters/test_peft_methods.py tests/adapters/test_trainers.py tests/cli/test_cli.py \
  tests/cli/test_languages.py tests/cli/test_sharing.py tests/data/test_forms.py \
  tests/data/test_images.py tests/data/test_sources.py tests/models/test_gguf.py \
  tests/models/test_load.py tests/recipes/test_recipe.py tests/reports/test_page.py \
  tests/statistics/test_collection.py tests/studies/test_image_run.py tests/studies/test_run.py \
  tests/studies/test_search.py tests/studies/test_study.py tests/studies/test_trials.py \
  tests/tasks/test_evaluation.py tests/tasks/test_harness.py tests/training/test_loop.py \
  tests/training/test_preference.py
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n 3 --dist worksteal -W default $(AT_THE_ENDS)

test-newest:
	rm -rf .venv-newest  # what was the newest may not be any more
	$(MAKE) VENV=.venv-newest CONSTRAINTS=/dev/null .venv-newest/.ready
	.venv-newest/bin/python -m pytest -n 3 --dist worksteal -W default $(AT_THE_ENDS)

check: style types

style: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --quiet tests/project/test_layout.py

types: $(READY)
	$(BIN)/mypy

# The site, in site/index.html; a link that leads nowhere is an error.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# A thousand damaged files, each read by a command: it ends well or says which file and why.
fuzz: $(READY)
	$(BIN)/python -m tests.fuzzing --cases 1000

# Every verb that writes, killed at random moments until there were 150 kills, and 100 pairs at once.
kill: $(READY)
	$(BIN)/python -m tests.killing --kills 150
	$(BIN)/python -m tests.killing --pairs 100

# Every kind of file that a command keeps, damaged 330 times: mended by the same command, or named.
damage: $(READY)
	$(BIN)/python -m tests.damaging --cases 330

# Known holes in what is installed; asks the package index's advisories.
audit: $(VENV)/.audit-ready
	$(BIN)/pip-audit --skip-editable --progress-spinner off

$(VENV)/.audit-ready: $(READY)
	$(BIN)/python -m pip install --quiet pip-audit
	@touch $@

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What others import, and what asks for a folder or a GPU.
NO_BENCH := command_lines end_to_end parts probed shapes timing on_gpu aftercare aftercare_smollm2 forecast measuring minilm repair_choices real_bases sequence_texts shared_measuring slices tables
bench: $(READY)
	@for file in $(filter-out $(NO_BENCH:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

# torch comes first and by its exact version: a loose `torch` can pull gigabytes of GPU libraries.
$(READY): pyproject.toml constraints.txt constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Forgetless needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-quantised .venv-oldest .venv-newest runs site .pytest_cache .mypy_cache .ruff_cache
