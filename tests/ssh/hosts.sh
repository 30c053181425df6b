#!/bin/bash
# hosts.sh - real hosts with sshd's on one machine, made of Linux namespaces. Needs root and the
# packages openssh-server, openssh-client, iproute2 and util-linux.
#
#   up N CPUS     start `login` and n1..nN; returns when every sshd answers (CPUS is not used)
#   down          end every process in them; files stay in $HPC_STATE
#
# Each host has its own network, UTS, IPC, PID and mount namespace: its own name, address, /tmp,
# /run, /dev/shm and /home. They share the disk otherwise. The user's key, and the configuration of
# its ssh, are left in $HPC_STATE/dot-ssh for whoever makes its home.
set -u
STATE=$(readlink -f "${HPC_STATE:?}")
USER_NAME=hpcuser USER_ID=20001
SUBNET=${HPC_SUBNET:?}
SELF=$(readlink -f "$0")

die() { echo "hosts.sh: $*" >&2; exit 1; }
pidof1() { cat "$STATE/pid/$1" 2>/dev/null; }
alive() { local p; p=$(pidof1 "$1") && tr '\0' '\n' <"/proc/$p/environ" 2>/dev/null | grep -qx "HPC_MACHINE=$STATE:$1"; }
addr() { if [ "$1" = login ]; then echo "$SUBNET.1"; else echo "$SUBNET.$((10 + ${1#n}))"; fi; }
inside() { local m=$1; shift; nsenter -t "$(pidof1 "$m")" -m -u -i -n -p -- "$@"; }
await() { local end=$((SECONDS + $1)); shift; until "$@" >/dev/null 2>&1; do [ $SECONDS -ge $end ] && return 1; sleep 0.05; done; }

open_way() { # open_way DIR: nobody's private folder stands between the user and DIR
    [ "$1" = / ] && return
    open_way "$(dirname "$1")"
    [ -d "$1" ] || { mkdir "$1"; chmod 755 "$1"; }
    case $(stat -c %A "$1") in *[xt]) ;; *) mount -t tmpfs -o mode=755 tmpfs "$1" ;; esac
}
put_back() { # put_back HELD AT: show a folder at its old place, readable by the user
    mkdir -p "$2"
    case $(stat -c %A "$1") in
    *r-[xt] | *rw[xt]) mount --bind "$1" "$2" ;;
    *)
        local top=/run/hold/top.${1##*/}
        mkdir -p "$top/up" "$top/work"; chmod 755 "$top/up"
        mount -t overlay overlay -o "lowerdir=$1,upperdir=$top/up,workdir=$top/work" "$2" ;;
    esac
}

machine() { # runs as pid 1 of a host
    local me=$1 keep=$HPC_SHARED:$HPC_EXPOSE:$STATE k i=0; local -a at=()
    cd /
    hostname "$me"
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/hold /run/sshd
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    # What is to be seen of the machine below is taken aside, and put back at its old place.
    IFS=:; for k in $keep; do
        [ -d "$k" ] || continue
        mkdir -p "/run/hold/$i"; mount --bind "$k" "/run/hold/$i"; at[i]=$k; i=$((i + 1))
    done; unset IFS
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=755 tmpfs /root
    mount --bind "/run/hold/$((i - 1))/$(home_of "$me")" /home
    for k in "${at[@]}"; do open_way "$(dirname "$k")"; done
    for ((k = 0; k < i; k++)); do put_back "/run/hold/$k" "${at[k]}"; done
    mount -t overlay overlay -o "lowerdir=$STATE/etc:/etc" /etc
    : >"$STATE/ready/$me.mounts"
    await 60 test -e "$STATE/ready/$me.net" || exit 1
    [ "$me" = login ] || "$(command -v sshd)" -D -e -f "$STATE/sshd_config" &
    trap 'exit 0' TERM
    while :; do sleep 1000 & wait $!; done # bash reaps the orphans
}
home_of() { if [ "$1" = login ]; then echo home; else echo "home.$1"; fi; }

boot() {
    local me=$1 p up
    rm -f "$STATE/ready/$me".*
    HPC_MACHINE="$STATE:$me" setsid unshare --net --uts --ipc --mount --pid --fork --kill-child=SIGKILL \
        bash "$SELF" _machine "$me" >>"$STATE/log/$me.log" 2>&1 </dev/null &
    up=$!; disown $up
    await 30 test -e "$STATE/ready/$me.mounts" || die "$me did not start: $(cat "$STATE/log/$me.log")"
    read -r p _ <"/proc/$up/task/$up/children"; echo "$p" >"$STATE/pid/$me"
    inside "$me" ip link set lo up
    if [ "$me" = login ]; then
        inside login sh -c "ip link add br0 type bridge && ip addr add $SUBNET.1/24 dev br0 && ip link set br0 up"
    else
        nsenter -t "$(pidof1 login)" -n ip link add "ve-$me" type veth peer name eth0 netns "$p"
        inside login sh -c "ip link set ve-$me master br0 && ip link set ve-$me up"
        inside "$me" sh -c "ip addr add $(addr "$me")/24 dev eth0 && ip link set eth0 up"
    fi
    : >"$STATE/ready/$me.net"
}

halt() { # SIGKILL to pid 1 ends every process of its PID namespace
    local p; alive "$1" || { rm -f "$STATE/pid/$1"; return 0; }
    p=$(pidof1 "$1"); kill -KILL "$p" 2>/dev/null
    await 10 test ! -e "/proc/$p"; rm -f "$STATE/pid/$1"
}

write_config() {
    local i key
    chmod 755 "$STATE"
    mkdir -p "$STATE"/{pid,log,ready,home,etc,dot-ssh}
    { grep -Ev "^($USER_NAME|sshd):" /etc/passwd
        echo "sshd:x:20022:65534::/run/sshd:/usr/sbin/nologin"
        echo "$USER_NAME:x:$USER_ID:$USER_ID::/home/$USER_NAME:/bin/bash"; } >"$STATE/etc/passwd"
    { grep -v "^$USER_NAME:" /etc/group; echo "$USER_NAME:x:$USER_ID:"; } >"$STATE/etc/group"
    (umask 077; printf '%s:*:19000:0:99999:7:::\n' root sshd "$USER_NAME" >"$STATE/etc/shadow")
    { echo "127.0.0.1 localhost"; for i in login $(seq -f 'n%g' 1 "$1"); do echo "$(addr "$i") $i"; done; } >"$STATE/etc/hosts"
    : >"$STATE/etc/resolv.conf"
    ssh-keygen -q -t ed25519 -N '' -f "$STATE/host_key"
    ssh-keygen -q -t ed25519 -N '' -f "$STATE/dot-ssh/id_test"
    key=$(cut -d' ' -f1,2 "$STATE/host_key.pub")
    printf '%s\n' "n*,[n*]:2222,$SUBNET.*,[$SUBNET.*]:2222 $key" >"$STATE/dot-ssh/known_hosts"
    cat >"$STATE/sshd_config" <<CONF
Port 22
Port 2222
HostKey $STATE/host_key
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
CONF
    cat >"$STATE/dot-ssh/config" <<CONF
Host *
    IdentityFile ~/.ssh/id_test
    StrictHostKeyChecking yes
Host nickname
    HostName n2
    Port 2222
    HostKeyAlias n2
    LogLevel QUIET
    LocalForward 127.0.0.1:4711 127.0.0.1:4712
    RemoteCommand echo never
    RequestTTY force
Host unknown-key
    HostName n1
    UserKnownHostsFile /dev/null
Host no-entry
    HostName n1
    HostKeyAlias n1
    User root
CONF
    for i in login $(seq -f 'n%g' 1 "$1"); do
        mkdir -p "$STATE/$(home_of "$i")/$USER_NAME"
        chmod 755 "$STATE/$(home_of "$i")"
        [ "$i" = login ] && continue
        mkdir -m 700 "$STATE/home.$i/$USER_NAME/.ssh" "$STATE/home.$i/$USER_NAME/work"
        cp "$STATE/dot-ssh/id_test.pub" "$STATE/home.$i/$USER_NAME/.ssh/authorized_keys"
        # A login shell that talks, as many do.
        echo 'echo "welcome to $HOSTNAME"; echo "mind the gap" >&2' >"$STATE/home.$i/$USER_NAME/.bashrc"
    done
    chown -R "$USER_ID:$USER_ID" "$STATE"/home*/"$USER_NAME" "$STATE/dot-ssh"
}

answers() { inside login bash -c "exec 3<>/dev/tcp/$1/$2 && read -r -t 5 line <&3 && [[ \$line == SSH-* ]]"; }

case ${1:-} in
_machine) machine "$2" ;;
up)
    write_config "${2:?N}"
    boot login
    for ((i = 1; i <= $2; i++)); do boot "n$i"; done
    for ((i = 1; i <= $2; i++)); do for port in 22 2222; do
        await 60 answers "n$i" $port || die "the sshd of n$i does not answer: $(cat "$STATE/log/n$i.log")"
    done; done ;;
down)
    for f in "$STATE"/pid/*; do [ -e "$f" ] && halt "$(basename "$f")"; done; exit 0 ;;
*) sed -n '2,11p' "$SELF"; exit 2 ;;
esac
