# make help   these lines
# make demo   set up .venv and run the main job on four real architectures
# make test   set up .venv, then lint, types, tests
# make docs   build the site of the documentation into out/site
# make test-torch TORCH=2.11.0   the part of the tests that depends on torch most, on that version, in a venv of its own
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
DOCS_PACKAGES := $(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])"

TORCH ?= 2.11.0
OTHER := .venv-torch-$(TORCH)
# a dozen architectures, all schedules, files, the table of edge cases, one program in every process
PART := $(addprefix tests/test_,zoo.py distributed.py built_stage.py saved.py edge_*.py one_program.py blame.py)

# so many processes of one thread each; what a file makes once for all its tests is made in one of them
WORKERS ?= 2
SPREAD := -q -n $(WORKERS) --dist worksteal

.PHONY: help dist docs demo test lint types tests test-torch bench balance zoo generate pretrained adapters distributed clean

.DEFAULT_GOAL := demo

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(READY)
	$(BIN)/python -m stagecut.tools.bench.demo

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -p stagecut
	$(BIN)/pyright

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(SPREAD)

test-torch: $(OTHER)/.ready
	OMP_NUM_THREADS=1 $(OTHER)/bin/pytest $(SPREAD) $(PART)

bench: $(READY)
	$(BIN)/python -m stagecut.tools.bench.compile

balance: $(READY)
	$(BIN)/python -m stagecut.tools.bench.balance

zoo: $(READY)
	$(BIN)/python tests/zoo/run.py --jobs 2

generate: $(READY)
	$(BIN)/python tests/generate/run.py

pretrained: $(READY)
	$(BIN)/python tests/hub/run.py

adapters: $(READY)
	$(BIN)/python tests/cluster/tune.py

distributed: $(READY)
	$(BIN)/python tests/cluster/run.py

# a wheel and an sdist in dist/, of the version that the tag names
dist: $(READY)
	rm -rf dist
	$(BIN)/python -c "import stagecut; tag = '$(TAG)'; assert tag in ('', 'v' + stagecut.__version__), tag"
	$(BIN)/python -m build --no-isolation --outdir dist

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

# the site is made from the sources: neither torch nor the project is installed for it
$(DOCS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q --disable-pip-version-check -c constraints.txt $$($(DOCS_PACKAGES))
	touch $@

.venv-torch-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch-$*
	grep -Ev '^(torch|setuptools)==' constraints.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/pip install -q --disable-pip-version-check -c .venv-torch-$*/constraints.txt -e '.[test]' torch==$*
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-torch-* out build dist *.egg-info
