# make demo    the whole job on the toy world, offline: label, features, train, evaluate, segment
# make test    lint, types and all tests
# make lock    requirements.lock: the newest versions within the ranges, with their hashes
# make pictures  the pictures of README and docs, after make demo
# make attack  the attacks of the tests, ATTACK times as many (8: a quarter of an hour)
#
# Both make .venv first. PYTHON chooses the interpreter (3.11 or newer), WORK where results go.

PYTHON ?= python3
WORK ?= work/toy
DATA ?= data/toy
TORCH ?= torch==2.13.0
ATTACK ?= 8
BIN := .venv/bin

RUN := $(BIN)/python
TOY := --config=configs/toy.py --workdir=$(WORK)
TRUTH := --config=configs/toy.py --workdir=$(WORK)/oracle --config.data.annotations=$(DATA)/train/labels
ON := --config.data.images=$(DATA)/train/images --config.data.words=$(DATA)/train/words.txt \
	--config.eval.folder=$(DATA)/test

demo: .venv/demo
	@echo "1/5  Scenes, and their pseudo labels by CLIP and SAM"
	@$(RUN) -m toyworld --out=$(DATA)
	@$(RUN) -m labelling $(TOY) $(ON)
	@echo "2/5  Patch features of the frozen vision encoder"
	@$(RUN) -m fmbseg_jax.features $(TOY) $(ON)
	@echo "3/5  The aligner; then, as the ceiling, one trained on the ground truth"
	@$(RUN) train.py $(TOY) $(ON)
	@$(RUN) -m labelling $(TRUTH) $(ON)
	@$(RUN) -m fmbseg_jax.features $(TRUTH) $(ON)
	@$(RUN) train.py $(TRUTH) $(ON)
	@echo "4/5  Evaluation on unseen scenes"
	@$(RUN) -m labelling $(TOY) $(ON) --predict
	@$(RUN) evaluate.py $(TOY) $(ON)
	@echo "5/5  Segmentation of a folder, by words of your choice"
	@$(RUN) -m fmbseg_jax.segment --model=$(WORK)/export --images=$(DATA)/test/images \
		--words="$$(paste -sd, $(DATA)/test/words.txt)" --out=$(WORK)/segmented
	@echo
	@echo "Look at $(WORK)/evaluation/test/contact_sheet.png. The aligner is in $(WORK)/export."
	@echo "On a page (.venv/bin/pip install -e '.[app]'):"
	@echo "  $(BIN)/fmbseg app --model=$(WORK)/export --examples=$(DATA)/test/images"
	@echo "Next, your own images (the toy's encoders know only its scenes, real ones are fetched):"
	@echo "  $(BIN)/fmbseg label --config=configs/folder.py --workdir=work/mine \\"
	@echo "      --images=PHOTOS --words=WORDS.txt"

test: .venv/test browser
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

.venv/demo: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/test: .venv/demo requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The web page is tested in a real browser: Debian's, where this may install it.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && echo "Installing chromium ..." \
			&& { apt-get install -qq -y chromium || { apt-get update -qq && apt-get install -qq -y chromium; }; } > /dev/null 2>&1; } \
		|| echo "No chromium or google-chrome: the tests of the web page in a browser will be skipped."

# For all systems and Pythons; hashes are those of PyPI's files.
lock: .venv/demo
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes \
		--no-header --upgrade --quiet --output-file requirements.lock

# The pictures of README and docs, from what `make demo` has left.
pictures: .venv/test browser
	@$(RUN) docs/pictures.py --work=$(WORK) --data=$(DATA)

# What make test does in minutes, many times over; at its end, how many attacks there were.
attack: .venv/test
	ATTACK=$(ATTACK) $(BIN)/python -m pytest -n 0 -q -p no:hypothesispytest \
		--durations=5 tests/test_attacks.py tests/test_attacks_on_the_page.py tests/test_damaged_files.py tests/test_damaged_bytes.py

clean:
	rm -rf $(WORK) $(DATA)

.PHONY: demo test browser lock pictures attack clean
