# make demo             train a small GPT on this machine in minutes, and talk to it; INPUT=my.txt trains on your text,
#                       CHATS=chats.jsonl on your conversations; MINUTES=20 gives a slow machine more time
# make venv             the environment only; TORCH_INDEX=https://download.pytorch.org/whl/cpu chooses a build of PyTorch
# make test, test-slow  lint, types and the tests; the tests that take minutes
# make lint             lint, formatting and types only
# make clean            remove what the demo and the tests made; never your data or checkpoints

PYTHON ?= python3
TORCH_INDEX ?=
INPUT ?=
MINUTES ?=
CHATS ?=
BIN = .venv/bin

.PHONY: venv venv-dev demo lint test test-slow clean

venv: .venv/installed
venv-dev: .venv/installed-dev

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt -c constraints.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: venv
	$(BIN)/python demo.py $(if $(INPUT),--input "$(INPUT)") $(if $(CHATS),--chats "$(CHATS)") $(if $(MINUTES),--minutes $(MINUTES))

lint: venv-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-slow: venv-dev
	$(BIN)/python -m pytest -q -m slow tests

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache __pycache__ */__pycache__ \
		data/demo checkpoints/demo plots/demo
