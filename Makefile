# make demo: set up, train on the embedded real images, show the report. make test: set up, run the suite, a process a core.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: setup setup-dev browser demo test check format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel ninja -c constraints.txt
	$(BIN)/pip install --quiet torch torchvision -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation deepspeed -c constraints.txt
	$(BIN)/pip install --quiet --no-build-isolation -e . -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]" -c constraints.txt
	touch $@

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

demo: setup
	$(BIN)/fastdeitlt demo

# The test of the report's layout needs a browser. As root on a Debian it is installed; elsewhere, without one, that one
# test is skipped and says so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
	  echo "no Chromium: the test of the report's layout is skipped; install the package chromium"

test: setup-dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
