# Needs python3 (3.11 or newer, with venv) and make; everything else is installed into .venv*/, but
# for the Slurm, the Grid Engine and the sshd of the tests: these are Debian's, and where they can be
# neither found nor installed, their tests are skipped.

PYTHON ?= python3
# The MPI of `make demo` and `make bench`, and the MPIs that `make test` goes through.
MPI ?= mpich
MPIS ?= mpich openmpi
RANKS ?= 4
PYTEST_ARGS ?=
# --need-hosts: where no hosts can be made, their tests fail instead of being skipped.
HOSTS_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore
# The tests set their own, and nothing else should reach them from outside.
unexport PYTHONPATH PYTHONHOME

# What Open MPI needs as root, and with more ranks than cores. MPICH takes no notice. The same table
# is in tests/helpers.py, for the tests that start an mpiexec themselves.
MPI_ENV = OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	OMPI_MCA_btl=sm,self,tcp OMPI_MCA_mpi_yield_when_idle=1 \
	PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
	PRTE_MCA_hwloc_default_binding_policy=none

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs clean install-hosts
.PHONY: $(foreach mpi,$(MPIS),test-$(mpi) outside-$(mpi) inworld-$(mpi) slurm-$(mpi) hosts-$(mpi))
.SECONDARY:
# The tests measure time limits, and two runs at once would disturb each other.
.NOTPARALLEL:

help:
	@echo 'make demo [MPI=openmpi]            a first look, in its own environment'
	@echo 'make test [MPIS="mpich openmpi"]   lint, then all tests with each MPI'
	@echo 'make slurm-mpich | slurm-openmpi   the tests with a real Slurm alone: root on Linux'
	@echo 'make hosts-mpich | hosts-openmpi   those with other schedulers, and ssh: the same'
	@echo 'make lint | format | bench | docs | clean'

# $(call make-venv,folder,extras): makes the environment if it is missing, then installs.
comma := ,
define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'hpcdist needs Python 3.11 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo 'this Python comes without venv (Debian, Ubuntu: install python3-venv)' >&2; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --editable '.[$(2)]'
endef

# One stamp for each MPI: two in one environment would overwrite each other's mpiexec, so a change of
# MPI begins with an empty one.
.venv/.installed-%: pyproject.toml
	rm -rf .venv
	$(call make-venv,.venv,$*)
	@touch $@

.venv-lint/.installed: pyproject.toml
	$(call make-venv,.venv-lint,lint)
	@touch $@

.venv-docs/.installed: pyproject.toml
	$(call make-venv,.venv-docs,docs)
	@touch $@

.venv-%/.installed: pyproject.toml
	$(call make-venv,.venv-$*,test$(comma)$*)
	@touch $@

demo: .venv/.installed-$(MPI)
	.venv/bin/python -m hpcdist demo

lint: .venv-lint/.installed
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/mypy --strict hpcdist

format: .venv-lint/.installed
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .

test: lint $(MPIS:%=test-%)

$(MPIS:%=test-%): test-%: outside-% inworld-% slurm-% hosts-%

$(MPIS:%=outside-%): outside-%: .venv-%/.installed
	@echo '== tests outside a world, with $*'
	.venv-$*/bin/python -m pytest tests/unit tests/cluster $(PYTEST_ARGS)

$(MPIS:%=inworld-%): inworld-%: .venv-%/.installed
	@echo '== tests inside a world of $(RANKS) ranks, with $*'
	$(MPI_ENV) .venv-$*/bin/mpiexec -n $(RANKS) \
		.venv-$*/bin/python -m pytest --color=no --with-mpi tests/mpi $(PYTEST_ARGS)

$(MPIS:%=slurm-%): slurm-%: .venv-%/.installed install-hosts
	@echo '== tests with a real Slurm, with $*'
	.venv-$*/bin/python -m pytest tests/slurm $(HOSTS_ARGS) $(PYTEST_ARGS)

$(MPIS:%=hosts-%): hosts-%: .venv-%/.installed install-hosts
	@echo '== tests with PBS, Grid Engine, LSF and ssh, with $*'
	.venv-$*/bin/python -m pytest tests/pbs tests/sge tests/lsf tests/ssh $(HOSTS_ARGS) $(PYTEST_ARGS)

install-hosts:
	tests/install.sh slurm sge ssh

bench: .venv-$(MPI)/.installed
	.venv-$(MPI)/bin/python -m benchmarks

docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
