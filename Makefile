# Every target sets up what it needs: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.PHONY: test test-fast demo lint docs gpu bench hub figures clean

FAST := $(addsuffix .py,$(addprefix tests/test_,cells modifier_graph derivation numpy functional dispatch layers layers_torch documents))

test: $(VENV)/test lint  ## lint, then every test that this machine can run
	$(BIN)/python -m pytest -n auto --dist worksteal -q

test-fast: $(VENV)/test  ## the tests to run while you work: two minutes on two cores
	$(BIN)/python -m pytest -n auto --dist worksteal -q $(FAST)

demo: $(VENV)/demo  ## train a character-level LSTM on real text, draw what its gates do
	$(BIN)/python -m gpu_rnn demo

lint: $(VENV)/test  ## the style, the types and the direction of imports; on the installed layout, where kernels/ is gpu_rnn.kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .build/lint build && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target .build/lint .
	MYPYPATH=.build/lint $(BIN)/mypy -p gpu_rnn
	cd .build/lint && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

gpu:  ## tests and benchmarks on this machine's NVIDIA GPU, with this machine's own python3; nothing is installed
	$(PYTHON) -m bench gpu --out $(or $(OUT),bench/results) --minutes $(or $(MINUTES),6) --stage $(or $(STAGE),rest)

bench: $(VENV)/demo  ## microbenchmarks on this machine, in under 15 minutes; then tables in the documents, and plots in bench/figures
	$(BIN)/python -m bench run
	$(BIN)/python -m bench report

hub:  ## the Triton kernels in the layout of Hugging Face's kernels hub, in .build/hub; by this machine's own python3
	$(PYTHON) -m hub --repo $(or $(REPO),owner/gpu-rnn)

docs: $(VENV)/docs  ## the documentation as a site, .build/site/index.html; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

figures: $(VENV)/demo  ## the figures of docs/derivation.md, from real runs
	$(BIN)/python docs/figures.py

$(VENV)/test $(VENV)/demo $(VENV)/docs: $(VENV)/%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .build build *.egg-info
