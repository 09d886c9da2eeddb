# vswapd: everything a clone can do. Needs python3 (3.11 or newer, with venv) and make.
#
# `make` alone lists the targets. What tests and checks need goes into .venv, what the demo needs and
# what is to be installed into build/; only `make install` and `make uninstall` write elsewhere.

PYTHON ?= python3
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# -- development ----------------------------------------------------------------------------------

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip --disable-pip-version-check --quiet install
# The interpreter's own pip may be too old to know dependency groups.
PIP_WITH_GROUPS := 'pip>=25.1'

# The stamp is newer than pyproject.toml when what is named there is installed.
$(VENV)/stamp: pyproject.toml
	@echo 'making $(VENV) (once; it takes a quarter of a minute)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --upgrade $(PIP_WITH_GROUPS)
	$(BIN)/python $(PIP_INSTALL) --editable . --group dev
	touch $@

.PHONY: venv
venv: $(VENV)/stamp ## install what tests and checks need into .venv

# The demo has an environment of its own: who only wants to see what this is installs no test tool.
DEMO := build/demo
$(DEMO)/stamp: pyproject.toml
	@echo 'making $(DEMO) (once; it takes a few seconds)'
	rm -rf $(DEMO)
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python $(PIP_INSTALL) --editable .
	$(DEMO)/bin/python -m pip --quiet --quiet uninstall --yes setuptools pip
	touch $@

.PHONY: demo
demo: $(DEMO)/stamp ## offload real memory to a daemon of its own and load it back
	$(DEMO)/bin/python -m vswapd.demo

.PHONY: test
test: $(VENV)/stamp ## run the whole test suite
	$(BIN)/python -m pytest

.PHONY: test-pythons
test-pythons: $(VENV)/stamp ## test client, backends and commands on all other versions of Python that are supported
	$(BIN)/python tests/pythons.py

.PHONY: check
check: $(VENV)/stamp ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

KILLS ?= 1000
.PHONY: torture
torture: $(VENV)/stamp ## kill the daemon KILLS= times in the middle of everything (SEED= does it again)
	VSWAPD_KILLS=$(KILLS) $(if $(SEED),VSWAPD_SEED=$(SEED)) $(BIN)/python -m pytest -s tests/torture

.PHONY: simulate
simulate: $(VENV)/stamp ## the engine in a simulated world: random seeds for SECONDS=, or one SEED=
	PYTHONPATH=tests SECONDS=$(or $(SECONDS),60) SEED=$(SEED) MOMENTS=$(or $(MOMENTS),1500) $(BIN)/python -m simulation

# Another stamp: few want it, and not every Python has it.
$(VENV)/fuzz: $(VENV)/stamp
	$(BIN)/python $(PIP_INSTALL) --group fuzz
	touch $@

.PHONY: fuzz
fuzz: $(VENV)/fuzz ## let hostile clients loose on the daemon for SECONDS=, guided by coverage (JOBS= at a time)
	$(BIN)/python tests/torture/fuzz.py --seconds $(or $(SECONDS),900) $(if $(JOBS),--jobs $(JOBS))

.PHONY: bench
bench: $(VENV)/stamp ## run the benchmarks, each beside its target
	$(BIN)/python -m bench

.PHONY: bench-peers
bench-peers: $(VENV)/stamp ## compare with zram, Redis, memcached and LMDB (zram needs root)
	$(BIN)/python -m bench.peers

.PHONY: clean
clean: ## remove both environments and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- what is to be installed, built without root ----------------------------------------------------
#
# build/stage holds a venv with vswapd and what it depends on and nothing else: no pip, no scripts,
# no path of this directory. The tools that build it live in a venv of their own.

STAGE := build/stage
TOOLS := build/tools
SHELLS := bash zsh fish
SITE = $$($(STAGE)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
SOURCES := pyproject.toml Makefile \
	$(shell find client daemon backends blockdev docs/man -name '*.py' -o -name '*.include')

# Another PYTHON= than the last time builds anew.
.PHONY: FORCE
build/interpreter: FORCE
	@mkdir -p build
	@echo '$(PYTHON)' | cmp -s - $@ || echo '$(PYTHON)' > $@

$(TOOLS)/stamp: pyproject.toml build/interpreter
	rm -rf $(TOOLS)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP_INSTALL) --upgrade $(PIP_WITH_GROUPS)
	$(TOOLS)/bin/python $(PIP_INSTALL) --group man
	touch $@

$(STAGE)/venv/stamp: $(SOURCES) $(TOOLS)/stamp
	rm -rf $(STAGE)/venv
	$(TOOLS)/bin/python -m venv --without-pip $(STAGE)/venv
	$(TOOLS)/bin/python $(PIP_INSTALL) --no-compile --no-warn-script-location --target $(SITE) .
	rm -rf $(SITE)/bin $(SITE)/vswapd-*.dist-info/direct_url.json
	cd $(STAGE)/venv && rm -rf bin/[Aa]ctivate* && sed -i '/^command/d' pyvenv.cfg
	touch $@

# One page per command; what the parser cannot know comes from docs/man.
MANPAGE = $(TOOLS)/bin/argparse-manpage --function build_parser --project-name vswapd --format pretty \
	--manual-title 'vswapd' --author 'the vswapd project' --version "$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"

$(STAGE)/man/vswapd.8: $(STAGE)/venv/stamp docs/man/vswapd.include
	mkdir -p $(@D)
	COLUMNS=80 PYTHONPATH=$(SITE) $(MANPAGE) --module vswapd.cli --prog vswapd --manual-section 8 \
		--description 'the page store: keeps pages of other programs compressed' \
		--include docs/man/vswapd.include --output $@

$(STAGE)/man/vswapctl.1: $(STAGE)/venv/stamp docs/man/vswapctl.include
	mkdir -p $(@D)
	COLUMNS=80 PYTHONPATH=$(SITE) $(MANPAGE) --module vswapd.ctl.parser --prog vswapctl --manual-section 1 \
		--include docs/man/vswapctl.include --output $@

$(STAGE)/completions/vswapctl.%: $(STAGE)/venv/stamp
	mkdir -p $(@D)
	$(STAGE)/venv/bin/python -I -m vswapd.ctl completion $* > $@

$(STAGE)/completions/vswapd.%: $(STAGE)/venv/stamp
	mkdir -p $(@D)
	$(STAGE)/venv/bin/python -I -m shtab --shell $* --prog vswapd --error-unimportable \
		vswapd.cli.build_parser > $@

.PHONY: man
man: $(STAGE)/man/vswapd.8 $(STAGE)/man/vswapctl.1 ## build the man pages into build/stage/man

.PHONY: stage
stage: man $(foreach shell,$(SHELLS),$(STAGE)/completions/vswapctl.$(shell) $(STAGE)/completions/vswapd.$(shell)) ## build what `make install` will copy

# -- installation -----------------------------------------------------------------------------------

LIBDIR = $(PREFIX)/lib/vswapd
COMMANDS := vswapd vswapctl
module_vswapd := vswapd
module_vswapctl := vswapd.ctl
# A SIGHUP that comes before Python can be told what to do with it.
before_vswapd := trap "" HUP; $(EMPTY)
# Every file outside LIBDIR that an installation puts in place, configuration aside.
INSTALLED = $(addprefix $(PREFIX)/, \
	bin/vswapd bin/vswapctl \
	lib/systemd/system/vswapd.service lib/systemd/system/vswapd.socket \
	lib/systemd/user/vswapd.service lib/systemd/user/vswapd.socket \
	lib/sysusers.d/vswapd.conf lib/tmpfiles.d/vswapd.conf \
	share/man/man8/vswapd.8 share/man/man1/vswapctl.1 \
	$(foreach command,$(COMMANDS), \
		share/bash-completion/completions/$(command) \
		share/zsh/site-functions/_$(command) \
		share/fish/vendor_completions.d/$(command).fish))
TO = $(DESTDIR)$(PREFIX)
# What the units say of places, for where they are really installed.
PLACED = s|/usr/local/bin/|$(PREFIX)/bin/|; s|/etc/vswapd|$(SYSCONFDIR)/vswapd|

# The running service is replaced as a whole: the new tree is complete before the old one goes.
.PHONY: install
install: stage ## install below PREFIX (/usr/local), staged below DESTDIR if given
	mkdir -p '$(TO)/lib'
	rm -rf '$(DESTDIR)$(LIBDIR).new'
	cp -RP $(STAGE)/venv '$(DESTDIR)$(LIBDIR).new'
	rm -f '$(DESTDIR)$(LIBDIR).new/stamp'
	chmod -R u=rwX,go=rX '$(DESTDIR)$(LIBDIR).new'
	$(STAGE)/venv/bin/python -m compileall -q -f -s '$(DESTDIR)$(LIBDIR).new' -p '$(LIBDIR)' '$(DESTDIR)$(LIBDIR).new'
	rm -rf '$(DESTDIR)$(LIBDIR)'
	mv '$(DESTDIR)$(LIBDIR).new' '$(DESTDIR)$(LIBDIR)'
	$(foreach command,$(COMMANDS), \
		mkdir -p build/bin && \
		printf '#!/bin/sh\n%sexec %s -I -m %s "$$@"\n' '$(before_$(command))' '$(LIBDIR)/bin/python' $(module_$(command)) \
			> build/bin/$(command) && \
		install -D -m 755 build/bin/$(command) '$(TO)/bin/$(command)' && \
		install -D -m 644 $(STAGE)/completions/$(command).bash '$(TO)/share/bash-completion/completions/$(command)' && \
		install -D -m 644 $(STAGE)/completions/$(command).zsh '$(TO)/share/zsh/site-functions/_$(command)' && \
		install -D -m 644 $(STAGE)/completions/$(command).fish '$(TO)/share/fish/vendor_completions.d/$(command).fish' &&) true
	install -D -m 644 $(STAGE)/man/vswapd.8 '$(TO)/share/man/man8/vswapd.8'
	install -D -m 644 $(STAGE)/man/vswapctl.1 '$(TO)/share/man/man1/vswapctl.1'
	sed '$(PLACED)' systemd/vswapd.service > build/bin/vswapd.service
	install -D -m 644 build/bin/vswapd.service '$(TO)/lib/systemd/system/vswapd.service'
	install -D -m 644 systemd/vswapd.socket '$(TO)/lib/systemd/system/vswapd.socket'
	sed '$(PLACED)' systemd/user/vswapd.service > build/bin/vswapd.user.service
	install -D -m 644 build/bin/vswapd.user.service '$(TO)/lib/systemd/user/vswapd.service'
	install -D -m 644 systemd/user/vswapd.socket '$(TO)/lib/systemd/user/vswapd.socket'
	install -D -m 644 systemd/vswapd.sysusers.conf '$(TO)/lib/sysusers.d/vswapd.conf'
	sed '$(PLACED)' systemd/vswapd.tmpfiles.conf > build/bin/vswapd.tmpfiles.conf
	install -D -m 644 build/bin/vswapd.tmpfiles.conf '$(TO)/lib/tmpfiles.d/vswapd.conf'
	test -e '$(DESTDIR)$(SYSCONFDIR)/vswapd/vswapd.toml' || \
		install -D -m 644 systemd/vswapd.toml '$(DESTDIR)$(SYSCONFDIR)/vswapd/vswapd.toml'
	@case "$$(readlink -f $(STAGE)/venv/bin/python)" in /home/* | /root/*) \
		echo 'The service cannot run this: its interpreter lies below a home directory, which the' \
			'unit hides. Give make stage and make install PYTHON=/usr/bin/python3.' >&2 ;; \
	esac

.PHONY: uninstall
uninstall: ## remove what install put in place; configuration and devices stay
	rm -rf '$(DESTDIR)$(LIBDIR)'
	rm -f $(foreach file,$(INSTALLED),'$(DESTDIR)$(file)')
