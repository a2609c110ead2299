# make demo   set up .venv and run the main job on four real architectures
# make test   set up .venv, then lint, types, tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types tests bench balance zoo distributed clean

demo: $(READY)
	$(BIN)/python -m stagecut.tools.demo

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -p stagecut
	$(BIN)/pyright

tests: $(READY)
	$(BIN)/pytest -q -n 2

bench: $(READY)
	$(BIN)/python -m stagecut.tools.bench

balance: $(READY)
	$(BIN)/python -m stagecut.tools.balance

zoo: $(READY)
	$(BIN)/python tests/zoo/run.py --jobs 2

distributed: $(READY)
	$(BIN)/python tests/cluster/run.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
