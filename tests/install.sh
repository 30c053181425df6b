#!/usr/bin/env bash
# Installs what the tests with several hosts need, where that can be done: as root, with apt-get.
#   tests/install.sh [slurm] [sge] [ssh] [fftw]
# It never fails: the tests say what is missing, and are skipped or fail, as they were told.
set -u
PATH=$PATH:/usr/sbin:/sbin:/usr/lib/gridengine

# All need machines of namespaces. What Slurm's sacct needs (MariaDB) is among its programs.
programs=(ip unshare nsenter setpriv)
packages=(iproute2 util-linux)
for wanted in "$@"; do
    case $wanted in
    slurm)
        programs+=(slurmctld slurmd srun munged slurmdbd mariadbd)
        packages+=(slurmctld slurmd slurm-client munge libpmi2-0 libpmix2
            slurmdbd slurm-wlm-mysql-plugin mariadb-server)
        ;;
    sge)
        programs+=(sge_qmaster sge_execd qsub)
        packages+=(gridengine-master gridengine-exec gridengine-client)
        ;;
    ssh)
        programs+=(sshd ssh ssh-keygen)
        packages+=(openssh-server openssh-client)
        ;;
    fftw)
        programs+=(fftw-wisdom)
        packages+=(libfftw3-dev libfftw3-bin)
        ;;
    esac
done

missing=()
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]} (this takes root and apt-get)"
    exit 0
fi

echo "installing for the tests: $* (missing: ${missing[*]})"
# The tests make their own configuration and start the daemons themselves: the packages must not.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
{
    echo "gridengine-common shared/gridengineconfig boolean false" | debconf-set-selections
    apt-get -q update && apt-get -q install --yes --no-install-recommends "${packages[@]}"
} </dev/null >"$log" 2>&1 || { tail -n 20 "$log"; echo "apt-get could not install them"; }
rm -f "$log"
exit 0
