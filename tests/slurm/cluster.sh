#!/bin/bash
# cluster.sh - a real multi-node Slurm cluster on one machine, made of Linux namespaces.
# Needs root and the packages: slurmctld slurmd slurm-client munge iproute2 util-linux (no systemd, no Docker).
#
#   up N_NODES CPUS_PER_NODE    start (or restart) the cluster; returns when all nodes are idle
#   down                        stop it; nothing is left behind except logs and /home in the state directory
#   exec-login CMD [ARGS...]    run CMD as $HPC_USER on the login node (in the caller's working directory)
#   exec-root CMD [ARGS...]     the same, as root
#   exec-node I CMD [ARGS...]   run CMD as $HPC_USER on node I (an out-of-band look, not a Slurm job)
#   kill-node I                 power loss: the link is cut silently and every process of the node is killed
#   cut-node I                  pull the cable: packets to and from the node vanish, its processes live on
#   heal-node I                 undo cut-node, or boot a killed node again; waits until Slurm has it back
#   status                      pids, addresses and sinfo
#
# login (10.77.0.1: slurmctld, bridge) and n1..nN (10.77.0.11..: slurmd) each have their own network, UTS, IPC, PID
# and mount namespace: own host name, /run, /tmp, /dev/shm, spool; same disk, shared /home. Nothing listens on the host.
set -u
STATE=${HPC_STATE:-${TMPDIR:-/tmp}/slurmcluster}   # logs, config, keys, shared /home
# what "up" was told holds for every later command on the same cluster, from whatever directory
[ "${1:-}" != up ] && [ -r "$STATE/settings" ] && . "$STATE/settings"
HPC_USER=${HPC_USER:-hpcuser}               # exists only inside the cluster
HPC_UID=${HPC_UID:-20001}
SHARED=${HPC_SHARED:-$PWD}                  # directories that all machines see, also below /tmp (":"-separated)
EXPOSE=${HPC_EXPOSE-$(python3 -c "import sys; print(sys.base_prefix)")} # the same, also below /root: python, as a rule
SUBNET=${HPC_SUBNET:-10.77.0}
SLURM=${HPC_SLURM:-1}                       # 0: the machines alone, no Slurm and no munge
KILLWAIT=${HPC_KILLWAIT:-3}                 # seconds between SIGTERM and SIGKILL at scancel/timeout (Slurm's default: 30)
SLURMDTIMEOUT=${HPC_SLURMDTIMEOUT:-10}      # seconds until an unreachable node is DOWN (Slurm's default: 300)
# HPC_ACCT=1 adds MariaDB + slurmdbd (packages slurmdbd slurm-wlm-mysql-plugin mariadb-server), so that sacct works
EXTRA=${HPC_EXTRA_CONF:-}                   # more lines for slurm.conf (last one wins)
SELF=$(readlink -f "$0")
mkdir -p "$STATE"; STATE=$(readlink -f "$STATE")

die()  { echo "cluster.sh: $*" >&2; exit 1; }
pidof1() { cat "$STATE/pid/$1" 2>/dev/null; }                       # host pid of that machine's pid 1
alive()  { local p; p=$(pidof1 "$1") && [ -n "$p" ] && [ "$(cat "/proc/$p/environ" 2>/dev/null | tr '\0' '\n' | sed -n 's/^HPC_MACHINE=//p')" = "$STATE:$1" ]; }
addr()   { if [ "$1" = login ]; then echo "$SUBNET.1"; else echo "$SUBNET.$((10 + ${1#n}))"; fi; }
inside() { local m=$1; shift; nsenter -t "$(pidof1 "$m")" -m -u -i -n -p -- "$@"; }
await()  { local end=$((SECONDS + $1)); shift; while :; do "$@" >/dev/null 2>&1 && return 0; [ $SECONDS -ge $end ] && return 1; sleep 0.05; done; }

open_way() {    # open_way DIR: nobody's private folder stands between the user and DIR
    local way=$1
    [ "$way" = / ] && return
    open_way "$(dirname "$way")"
    [ -d "$way" ] || { mkdir "$way"; chmod 755 "$way"; }
    case $(stat -c %A "$way") in *[xt]) ;; *) mount -t tmpfs -o mode=755 tmpfs "$way" ;; esac
}
put_back() {    # put_back HELD AT: show a folder at its old place, readable by the user
    mkdir -p "$2"
    case $(stat -c %A "$1") in
    *r-[xt]|*rw[xt]) mount --bind "$1" "$2" ;;
    *)  # a folder of mode 0700: the same under one of mode 0755, and read-only for the host's sake
        local top=/run/hold/top.${1##*/}
        mkdir -p "$top/up" "$top/work"; chmod 755 "$top/up"
        mount -t overlay overlay -o "lowerdir=$1,upperdir=$top/up,workdir=$top/work" "$2" ;;
    esac
}

# ---- runs as pid 1 of each machine ---------------------------------------------------------------------------------
machine() {
    local me=$1 d
    cd /                                # the caller's directory may be hidden in here ("Unable to return to working directory")
    hostname "$me"
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/munge /run/user /run/lock /run/hold
    mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
    # /tmp is private, /root is hidden and /home is the cluster's; what is to be seen of the machine
    # below is taken aside first and put back at its old place afterwards
    local keep="$SHARED:$EXPOSE:$STATE" k i=0; local -a at=()
    IFS=:; for k in $keep; do
        [ -d "$k" ] || continue
        mkdir -p "/run/hold/$i"; mount --bind "$k" "/run/hold/$i"; at[i]=$k; i=$((i + 1))
    done; unset IFS
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=755 tmpfs /root
    mount --bind "/run/hold/$((i - 1))/home" /home
    for k in "${at[@]}"; do open_way "$(dirname "$k")"; done
    for ((k = 0; k < i; k++)); do put_back "/run/hold/$k" "${at[k]}"; done
    # /etc: ours on top of the host's, read-only. (Not file by file: when a package manager on the host renames a new
    # /etc/group into place, the kernel silently drops a bind mount that sat on the old one.)
    mount -t overlay overlay -o "lowerdir=$STATE/etc:/etc" /etc
    if [ "$SLURM" = 0 ]; then   # hosts alone: somebody else runs jobs on them
        : >"$STATE/ready/$me.mounts"
        trap 'exit 0' TERM
        while :; do sleep 1000 & wait $!; done
    fi
    chown munge /run/munge
    mount --bind "$STATE/etc/slurm" /etc/slurm
    mount --bind "$STATE/etc/munge" /etc/munge
    mount -t tmpfs -o mode=755 tmpfs /var/spool; mkdir -p /var/spool/slurmd /var/spool/slurmctld; chown slurm /var/spool/slurmctld
    # Debian's mpi/pmix plugin opens libpmix.so, which only libpmix-dev ships: give it the link (in this machine only)
    d=/usr/lib/x86_64-linux-gnu/pmix2/lib
    if [ -e $d/libpmix.so.2 ] && [ ! -e $d/libpmix.so ]; then
        mkdir -p /run/ov/up /run/ov/work; ln -s libpmix.so.2 /run/ov/up/libpmix.so
        mount -t overlay overlay -o lowerdir=$d,upperdir=/run/ov/up,workdir=/run/ov/work $d
    fi
    : >"$STATE/ready/$me.mounts"
    await 60 test -e "$STATE/ready/$me.net" || exit 1
    # one munged per machine, as on a real cluster; -F keeps it a child of ours
    setpriv --reuid=munge --regid=munge --clear-groups munged -F --num-threads=2 --socket=/run/munge/munge.socket.2 \
        --pid-file=/run/munge/munged.pid --log-file="$STATE/log/munged.$me.log" --seed-file=/run/munge/seed \
        >>"$STATE/log/munged.$me.out" 2>&1 &
    await 30 test -S /run/munge/munge.socket.2
    [ "$me" = login ] && [ -e "$STATE/etc/slurm/slurmdbd.conf" ] && accounting
    if [ "$me" = login ]; then slurmctld -D >>"$STATE/log/slurmctld.out" 2>&1 &
    else slurmd -D -N "$me" >>"$STATE/log/slurmd.$me.out" 2>&1 & fi
    trap 'exit 0' TERM
    while :; do sleep 1000 & wait $!; done                          # bash reaps the orphans
}

accounting() {    # MariaDB (socket only, in memory) and slurmdbd, for sacct
    mkdir -p /run/mysqld /run/slurmdbd /var/spool/db; chown slurm /run/slurmdbd; chown mysql /run/mysqld /var/spool/db
    mariadb-install-db --no-defaults --user=mysql --datadir=/var/spool/db --skip-test-db --auth-root-authentication-method=socket >"$STATE/log/mariadb.out" 2>&1
    mariadbd --no-defaults --user=mysql --datadir=/var/spool/db --socket=/run/mysqld/mysqld.sock --pid-file=/run/mysqld/pid --skip-networking \
        --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 >>"$STATE/log/mariadb.out" 2>&1 &
    await 15 mariadb --no-defaults --socket=/run/mysqld/mysqld.sock -e "CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket; GRANT ALL ON slurm_acct_db.* TO slurm@localhost"
    setpriv --reuid=slurm --regid=slurm --clear-groups slurmdbd -D >>"$STATE/log/slurmdbd.out" 2>&1 &
    await 15 sacctmgr -n show cluster
}

boot() {    # boot NAME: namespaces, network, daemons
    local me=$1 p
    rm -f "$STATE/ready/$me".*
    HPC_MACHINE="$STATE:$me" setsid unshare --net --uts --ipc --mount --pid --fork --kill-child=SIGKILL \
        bash "$SELF" _machine "$me" >>"$STATE/log/init.$me.log" 2>&1 </dev/null 9>&- &
    local up=$!; disown $up
    await 30 test -e "$STATE/ready/$me.mounts" || die "$me did not start: $(cat "$STATE/log/init.$me.log")"
    read -r p _ <"/proc/$up/task/$up/children"; echo "$p" >"$STATE/pid/$me"
    inside "$me" ip link set lo up
    if [ "$me" = login ]; then
        inside login sh -c "ip link add br0 type bridge && ip link set br0 address 02:00:00:00:00:01 && ip addr add $SUBNET.1/24 dev br0 && ip link set br0 up"
    else
        nsenter -t "$(pidof1 login)" -n ip link add "ve-$me" type veth peer name eth0 netns "$p"
        inside login sh -c "ip link set ve-$me master br0 && ip link set ve-$me up"
        inside "$me" sh -c "ip addr add $(addr "$me")/24 dev eth0 && ip link set eth0 up && ip route add default via $SUBNET.1"
    fi
    : >"$STATE/ready/$me.net"
}

halt() {    # halt NAME: SIGKILL to pid 1 ends every process of that PID namespace
    local p; alive "$1" || { rm -f "$STATE/pid/$1"; return 0; }
    p=$(pidof1 "$1"); kill -KILL "$p" 2>/dev/null
    await 10 test ! -e "/proc/$p"; rm -f "$STATE/pid/$1"
}

write_config() {
    local n=$1 i
    for i in SHARED EXPOSE SUBNET SLURM HPC_USER HPC_UID KILLWAIT SLURMDTIMEOUT EXTRA; do
        case $i in HPC_*) printf '%s=%q\n' "$i" "${!i}" ;; *) printf 'HPC_%s=%q\n' "$i" "${!i}" ;; esac
    done | sed 's/^HPC_EXTRA=/HPC_EXTRA_CONF=/' >"$STATE/settings"
    chmod 755 "$STATE"
    mkdir -p "$STATE"/{pid,log,ready,home,etc/slurm,etc/munge}; chmod 755 "$STATE" "$STATE"/{log,home,etc,etc/slurm}
    chmod 711 "$STATE/log"; rm -f "$STATE"/log/*
    { grep -Ev "^($HPC_USER|sshd):" /etc/passwd
        echo "sshd:x:20022:65534::/run/sshd:/usr/sbin/nologin"
        echo "$HPC_USER:x:$HPC_UID:$HPC_UID::/home/$HPC_USER:/bin/bash"; } >"$STATE/etc/passwd"
    { grep -v "^$HPC_USER:" /etc/group; echo "$HPC_USER:x:$HPC_UID:"; } >"$STATE/etc/group"
    (umask 077; printf '%s:*:19000:0:99999:7:::\n' root sshd "$HPC_USER" munge slurm >"$STATE/etc/shadow"); chmod 600 "$STATE/etc/shadow"
    install -d -o "$HPC_UID" -g "$HPC_UID" -m 755 "$STATE/home/$HPC_USER"
    { echo "127.0.0.1 localhost"; echo "$(addr login) login"; for ((i = 1; i <= n; i++)); do echo "$(addr "n$i") n$i"; done; } >"$STATE/etc/hosts"
    : >"$STATE/etc/resolv.conf"
    echo "$n" >"$STATE/nodes"
}

write_slurm_config() {
    local n=$1 cpus=$2 i
    setpriv --reuid=slurm --regid=slurm --clear-groups test -x "$STATE" || die "user slurm cannot reach $STATE: a directory above it lacks o+x"
    chown munge "$STATE/etc/munge"; chmod 700 "$STATE/etc/munge"
    for i in login $(seq -f 'n%g' 1 "$n"); do install -o munge -m 600 /dev/null "$STATE/log/munged.$i.log"; done
    head -c 128 /dev/urandom >"$STATE/etc/munge/munge.key"; chown munge "$STATE/etc/munge/munge.key"; chmod 400 "$STATE/etc/munge/munge.key"
    install -o slurm -m 644 /dev/null "$STATE/log/jobcomp.log"; install -o slurm -m 644 /dev/null "$STATE/log/slurmctld.log"
    cat >"$STATE/etc/slurm/slurm.conf" <<CONF
ClusterName=hpcdist
SlurmctldHost=login($(addr login))
SlurmUser=slurm
AuthType=auth/munge
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobcomp.log
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=$KILLWAIT
SlurmdTimeout=$SLURMDTIMEOUT
SlurmctldTimeout=10
MessageTimeout=5
CompleteWait=0
MinJobAge=600
MaxArraySize=1001
GresTypes=gpu
NodeName=n[1-$n] CPUs=$cpus RealMemory=16000 Gres=gpu:4 State=UNKNOWN
PartitionName=compute Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
PartitionName=debug Nodes=ALL MaxTime=2 DefaultTime=1 State=UP
$EXTRA
CONF
    rm -f "$STATE/etc/slurm/slurmdbd.conf"
    if [ "${HPC_ACCT:-0}" = 1 ]; then
        sed -i '/^JobCompType=/d; /^JobCompLoc=/d' "$STATE/etc/slurm/slurm.conf"
        printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost=login JobAcctGatherFrequency=0 >>"$STATE/etc/slurm/slurm.conf"
        printf '%s\n' AuthType=auth/munge DbdHost=login SlurmUser=slurm StorageType=accounting_storage/mysql StorageHost=localhost \
            StorageUser=slurm StorageLoc=slurm_acct_db "LogFile=$STATE/log/slurmdbd.log" PidFile=/run/slurmdbd/pid >"$STATE/etc/slurm/slurmdbd.conf"
        chown slurm "$STATE/etc/slurm/slurmdbd.conf"; chmod 600 "$STATE/etc/slurm/slurmdbd.conf"; install -o slurm -m 644 /dev/null "$STATE/log/slurmdbd.log"
    fi
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$STATE/etc/slurm/cgroup.conf"
    # Any device will do: nobody opens it, and Slurm only tells jobs which ones are theirs
    printf 'Name=gpu File=/dev/%s\n' null zero full random >"$STATE/etc/slurm/gres.conf"
}

all_idle() { [ "$(inside login timeout 3 sinfo -h -N -p compute -o '%T' 2>/dev/null | grep -cx idle)" = "$1" ]; }

case ${1:-} in
_machine) machine "$2" ;;
up)
    exec 9>"$STATE/lock"; flock 9
    n=${2:?N_NODES}; cpus=${3:?CPUS_PER_NODE}
    bash "$SELF" down 9>&- || exit 1
    write_config "$n"
    [ "$SLURM" = 0 ] || write_slurm_config "$n" "$cpus"
    boot login
    for ((i = 1; i <= n; i++)); do boot "n$i"; done
    [ "$SLURM" = 0 ] || await 60 all_idle "$n" || { inside login sinfo -N -l; die "not all nodes came up, see $STATE/log"; } ;;
down)
    for f in "$STATE"/pid/n* "$STATE"/pid/login; do [ -e "$f" ] && halt "$(basename "$f")"; done; exit 0 ;;
exec-login|exec-root|exec-node)
    how=$1; m=login; shift; [ "$how" = exec-node ] && { m=n${1#n}; shift; }
    alive "$m" || die "$m is not up"
    if [ "$how" = exec-root ]; then
        exec nsenter -t "$(pidof1 "$m")" -m -u -i -n -p -- sh -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@"
    fi
    exec nsenter -t "$(pidof1 "$m")" -m -u -i -n -p -- runuser -u "$HPC_USER" -- sh -c 'cd "$0" 2>/dev/null || cd; exec "$@"' "$PWD" "$@" ;;
kill-node) inside login ip link del "ve-n${2#n}" 2>/dev/null; halt "n${2#n}" ;;
cut-node)  inside login ip link set "ve-n${2#n}" nomaster ;;
heal-node)
    m=n${2#n}; if alive "$m"; then inside login ip link set "ve-$m" master br0; else boot "$m"; fi
    await 40 inside login sh -c "sinfo -h -n $m -N -p compute -o %T | grep -qE '^(idle|mixed|allocated)\$'" ||
        { inside login scontrol update nodename="$m" state=resume; await 20 inside login sh -c "sinfo -h -n $m -N -p compute -o %T | grep -qE '^(idle|mixed|allocated)\$'"; } || die "$m did not come back" ;;
status)
    for f in "$STATE"/pid/*; do [ -e "$f" ] || continue; m=$(basename "$f"); echo "$m $(addr "$m") pid=$(cat "$f") $(alive "$m" && echo up || echo dead)"; done
    alive login && inside login sinfo -N -l ;;
*) sed -n '2,18p' "$SELF"; exit 2 ;;
esac
