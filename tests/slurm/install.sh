#!/usr/bin/env bash
# Installs what the tests with a real Slurm need, where that can be done: as root, with apt-get.
# Without arguments also what sacct needs (MariaDB). It never fails: tests/slurm/conftest.py says
# what is missing, and skips or fails as it was told.
set -u

programs=(slurmctld slurmd srun munged slurmdbd mariadbd ip unshare nsenter setpriv)
packages=(slurmctld slurmd slurm-client munge libpmi2-0 libpmix2 iproute2 util-linux
    slurmdbd slurm-wlm-mysql-plugin mariadb-server)

missing=()
for program in "${programs[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]} (this takes root and apt-get)"
    exit 0
fi

echo "installing Slurm for the tests (missing: ${missing[*]})"
# The tests start the daemons themselves: the packages must not.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
{ apt-get -q update && apt-get -q install --yes --no-install-recommends "${packages[@]}"; } \
    </dev/null >"$log" 2>&1 || { tail -n 20 "$log"; echo "apt-get could not install Slurm"; }
rm -f "$log"
exit 0
