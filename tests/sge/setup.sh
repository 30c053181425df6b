#!/bin/bash
# setup.sh N_NODES SLOTS - a real Grid Engine on the machines that tests/slurm/cluster.sh has made
# (HPC_SLURM=0): the master on `login`, an execution daemon on each of n1..nN, a cell of its own.
# It needs the packages named in tests/install.sh. The daemons end with their machines.
set -u
STATE=$HPC_STATE
export SGE_ROOT=$STATE/sge SGE_CELL=default SGE_QMASTER_PORT=6444 SGE_EXECD_PORT=6445
LIB=/usr/lib/gridengine SHARE=/usr/share/gridengine OBJECT=$STATE/sge/object

die()    { echo "setup.sh: $*" >&2; exit 1; }
inside() { local m=$1; shift; nsenter -t "$(cat "$STATE/pid/$m")" -m -u -i -n -p -- "$@"; }
await()  { local end=$((SECONDS + $1)); shift; while :; do "$@" >/dev/null 2>&1 && return 0; [ $SECONDS -ge $end ] && return 1; sleep 0.05; done; }
daemon() {      # daemon MACHINE PROGRAM
    setsid nsenter -t "$(cat "$STATE/pid/$1")" -m -u -i -n -p -- env SGE_ND=1 "$LIB/$2" \
        >>"$STATE/log/$2.$1.out" 2>&1 </dev/null &
    disown $!
}
spool()  {      # spool KIND WHAT: write to the spool, before there is a master
    setpriv --reuid=sgeadmin --regid=sgeadmin --clear-groups \
        env LD_LIBRARY_PATH=$LIB $LIB/spooldefaults.bin "$@" || die "spooldefaults $*"
}

write_files() {
    local arch; arch=$($SHARE/util/arch)
    mkdir -p "$SGE_ROOT"/{default/common,spool/qmaster,bin,utilbin}
    ln -s $SHARE/util "$SGE_ROOT/util"
    ln -s $LIB "$SGE_ROOT/bin/$arch"
    ln -s $LIB "$SGE_ROOT/utilbin/$arch"
    echo login >"$SGE_ROOT/default/common/act_qmaster"
    printf '%s\n' "admin_user sgeadmin" "default_domain none" "ignore_fqdn false" \
        "spooling_method classic" "spooling_lib libspoolc" \
        "spooling_params $SGE_ROOT/default/common;$SGE_ROOT/spool/qmaster" "binary_path $LIB" \
        "qmaster_spool_dir $SGE_ROOT/spool/qmaster" "security_mode none" "listener_threads 2" \
        "worker_threads 2" "scheduler_threads 1" >"$SGE_ROOT/default/common/bootstrap"
    sed -e "s,^execd_spool_dir .*,execd_spool_dir $SGE_ROOT/spool," -e 's,^mailer .*,mailer /bin/true,' \
        -e 's,^load_report_time .*,load_report_time 00:00:05,' -e 's,flush_time=00:00:15,flush_time=00:00:01,' \
        $SHARE/default-configuration >"$SGE_ROOT/configuration"
    chown -R sgeadmin "$SGE_ROOT"
    setpriv --reuid=sgeadmin --regid=sgeadmin --clear-groups $LIB/spoolinit classic libspoolc \
        "$SGE_ROOT/default/common;$SGE_ROOT/spool/qmaster" init || die "spoolinit"
    spool configuration "$SGE_ROOT/configuration"
    spool complexes $SHARE/util/resources/centry
    spool usersets $SHARE/util/resources/usersets
    spool managers root sgeadmin
}

add()    { printf '%s\n' "${@:2}" >"$OBJECT" && inside login qconf "$1" "$OBJECT"; }
filled() {      # filled TEXT NAME VALUE...: what qconf shows, with other values
    local text=$1; shift
    while [ $# -gt 0 ]; do text=$(sed "s,^$1 .*,$1 $2," <<<"$text"); shift 2; done
    echo "$text"
}
configure() {
    local n=$1 slots=$2 i nodes=""
    for ((i = 1; i <= n; i++)); do
        inside login qconf -ah "n$i" && add -Ae "hostname n$i" "load_scaling NONE" "complex_values NONE" \
            "user_lists NONE" "xuser_lists NONE" "projects NONE" "xprojects NONE" "usage_scaling NONE" \
            "report_variables NONE" || return
        nodes+=" n$i"
    done
    inside login qconf -as login && add -Ahgrp "group_name @allhosts" "hostlist$nodes" || return
    add -Msconf "$(filled "$(inside login qconf -ssconf)" schedule_interval 0:0:1 flush_submit_sec 1 \
        flush_finish_sec 1 job_load_adjustments NONE)" || return
    for i in 'mpi $fill_up TRUE' 'spread $round_robin TRUE' 'loose $fill_up FALSE'; do
        set -- $i
        add -Ap "pe_name $1" "slots 999" "user_lists NONE" "xuser_lists NONE" "start_proc_args NONE" \
            "stop_proc_args NONE" "allocation_rule $2" "control_slaves $3" "job_is_first_task FALSE" \
            "urgency_slots min" "accounting_summary FALSE" "qsort_args NONE" || return
    done
    # No load thresholds: a busy machine would close the queue.
    add -Aq "$(filled "$(inside login qconf -sq)" qname all.q hostlist @allhosts load_thresholds NONE \
        slots "$slots" pe_list "mpi spread loose" shell /bin/bash)"
}
all_there() { [ "$(inside login qstat -f 2>/dev/null | grep -c 'lx-[a-z0-9]* *$')" = "$1" ]; }

write_files
daemon login sge_qmaster
await 60 inside login qconf -sh || die "the master does not answer: $(tail "$SGE_ROOT"/spool/qmaster/messages)"
configure "$1" "$2" || die "qconf refused"
for ((i = 1; i <= $1; i++)); do daemon "n$i" sge_execd; done
await 60 all_there "$1" || { inside login qstat -f; die "not all nodes came up"; }
