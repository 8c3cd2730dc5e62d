# make demo    a virtual environment, the digits recipe undefended, with NoPeek and with a channel, audited, a report
# make test    the tests, with everything they need       make test ARGS="-k cuts"
# make check   ruff and mypy                              make docs   docs/recipes.md, from the model
# All of them make .venv ready first, from whatever state it is in, and lose no time where it is ready.

.NOTPARALLEL:
.PHONY: demo test check docs
unexport PYTHONHOME PYTHONPATH

VENV := .venv/bin
# A Python of 3.11 or newer that can make environments, and not the one inside .venv, which may have to go.
FIND_PYTHON = PATH="$(subst $(CURDIR)/$(VENV):,,$(PATH))"; for python in python3 python3.11 python3.12 python3.13; do \
  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec echo $$python; done
READY = PATH="$(subst $(CURDIR)/$(VENV):,,$(PATH))"; python=$$($(FIND_PYTHON)); \
  test -n "$$python" || { echo "milkglass needs Python 3.11 or newer with its venv module" >&2; exit 1; }; \
  $$python .ci/environment.py
UNDEFENDED := runs/demo/undefended
NOPEEK := runs/demo/nopeek
CHANNEL := runs/demo/channel

demo:
	@$(READY) demo
	rm -rf runs/demo
	$(VENV)/milkglass train examples/digits.toml --set 'defense={}' --out $(UNDEFENDED)
	$(VENV)/milkglass train examples/digits.toml --out $(NOPEEK)
	$(VENV)/milkglass train examples/digits.toml --set 'defense={channel={},entropy={weight=0.02}}' --out $(CHANNEL)
	$(VENV)/milkglass audit $(UNDEFENDED) --reference $(UNDEFENDED)
	$(VENV)/milkglass audit $(NOPEEK) --reference $(UNDEFENDED)
	$(VENV)/milkglass audit $(CHANNEL) --reference $(UNDEFENDED)
	$(VENV)/milkglass report runs/demo

# One thread in each of two processes: on two cores, more threads make the small networks of the tests slower.
test:
	@$(READY) test
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -n 2 $(ARGS)

check:
	@$(READY) check
	$(VENV)/python -m ruff check .
	$(VENV)/python -m ruff format --check .
	$(VENV)/python -m mypy

docs:
	@$(READY) demo
	$(VENV)/python -c "from milkglass.recipe import reference_page; print(reference_page(), end='')" > docs/recipes.md
