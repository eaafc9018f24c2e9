# setup · demo · test · ladder · check · proto · web · kafka · bench · nightly
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
SEED ?= $(shell date +%Y%m%d)

.PHONY: setup demo test ladder check proto web kafka bench nightly

setup: $(STAMP)

# pip verifies every hash of the lock file; the project itself is installed without touching its dependencies.
$(STAMP): requirements.lock pyproject.toml
	@tools/make_venv $(PYTHON) $(VENV)
	@echo "installing dependencies into $(VENV) (about a minute the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	@$(BIN)/cybermesh demo $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# The long rungs of consensus: 20,000 worlds with twins, 5,000 with Byzantine validators, a crash before every effect, and four
# processes that are killed, stopped and cut off from each other.
ladder: $(STAMP)
	@$(BIN)/python -m pytest -q -m ladder -n auto --maxprocesses 4 --dist worksteal tests/ladder $(ARGS)
	@$(BIN)/python -m tests.e2e.chaos --seconds 30 --seed 1

check: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tools/generate_proto.py --check
	@$(BIN)/python -m pytest -q tests/test_tidy.py

proto: $(STAMP)
	@$(BIN)/python tools/generate_proto.py

# The dashboard is not there yet; see CHANGELOG.md.
web: $(STAMP)
	@echo "nothing to build: the dashboard is not part of this version"

# A development broker in the foreground; needs Java 17 and, the first time, Maven.
kafka: $(STAMP)
	@$(BIN)/python -m tools.kafka_broker run

bench: $(STAMP)
	@$(BIN)/cybermesh bench idle $(ARGS)
	@$(BIN)/cybermesh bench flows $(ARGS)
	@$(BIN)/cybermesh bench detect $(ARGS)
	@$(BIN)/cybermesh bench logs $(ARGS)
	@$(BIN)/cybermesh bench consensus $(ARGS)

# Longer campaigns, run by hand; their figures go to docs/measurements.md with seed and commit.
nightly: $(STAMP)
	@HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest
	@$(BIN)/python -m tests.e2e.chaos --seconds 180
	@$(BIN)/cybermesh simulate --scenarios 200000 --seed 1 --validators 4 --kind mixed
	@$(BIN)/cybermesh simulate --scenarios 1000000 --seed 100000 --validators 4 --twins 1
	@$(BIN)/cybermesh simulate --scenarios 100000 --seed 100000 --validators 4 --byzantine 1
	@for target in decoder pcap pcapng; do \
		$(BIN)/python -m tests.fuzz.campaign $$target --seconds 600 --seed $(SEED) --corpus ../shared/data/pcaps || exit 1; \
	done
	@$(BIN)/python -m tests.campaigns.kills --broker 20 --consumer 90 --producer 90 --seed 1
	@$(BIN)/python -m tests.campaigns.outage --seconds 60
	@$(BIN)/python -m tests.campaigns.bans --bans 20000 --producers 100 --per-minute 6000
