# `make sweep` and `make test` need nothing but Python 3.11 or 3.12: the environment in .venv is
# made when it is missing and re-used until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

# Two test processes, one thread each: the small model gains nothing from more.
WORKERS ?= 2

.DELETE_ON_ERROR:
.PHONY: sweep test browser lint clean help

help:
	@echo "make sweep   quantize and evaluate the small model: morphoquant, rtn, quarot and fp16"
	@echo "             (ARGS='bits=w4a8 limit=20' adds overrides)"
	@echo "make test    ruff, mypy and pytest, as in CI"
	@echo "make clean   remove the environment (runs/ and .cache/ stay)"

sweep: $(VENV)/.installed
	$(BIN)/python run.py -m method=morphoquant,rtn,quarot $(ARGS)

test: $(VENV)/.installed-test browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

# The report is opened in a real browser. Without one that test is skipped, and fails in CI.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
	|| command -v google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && echo "installing chromium, in which the report is tested" && apt-get update -qq \
	     && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| echo "no Chromium: the report is not tested in a browser (Debian: apt-get install chromium)"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 12) else f"Python 3.11 or 3.12 is needed, and $(PYTHON) is {v[0]}.{v[1]}. Say which to use: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One pip command each: resolved apart, latex2sympy2 would pull an antlr4 that Hydra cannot use.
$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
