#!/usr/bin/env bash
# Run a program on several hosts that are namespaces of this machine: a store between hosts without a second machine.
#
#     sudo examples/two_hosts.sh [--hosts N] COMMAND...
#
# Each host has a network, process ids, a name and shared memory of its own; a switch joins them. On the first one a
# head of Ray is started, on the others a node each, all with a new token; then COMMAND runs on every host at the same
# time, with the variables that torchrun sets (the first host has rank 0) and RAY_ADDRESS. So both "dist_sync" and
# "dist_async" find the others. For example:
#
#     sudo examples/two_hosts.sh .venv/bin/python -c '
#     import os, numpy, tensorkv
#     kv = tensorkv.create("dist_async", num_servers=2)
#     kv.init("w", numpy.zeros(3)); kv.barrier(); kv.push("w", numpy.ones(3)); kv.barrier()
#     print(os.uname().nodename, kv.pull("w"), [server["host"] for server in kv.stats()["servers"]])
#     kv.close()'
#
# Needs root, the commands ip, unshare and nsenter, and ray beside the Python that is first in COMMAND, or on PATH.
# All that it makes ends with it. In place of COMMAND, a shell on the first host is `bash`.
set -euo pipefail

hosts=2
if [ "${1:-}" = --hosts ]; then hosts=$2; shift 2; fi
if [ $# -eq 0 ]; then sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | head -n -1; exit 2; fi

tag=tkv$$
ray=ray
if [ -x "$(dirname "$1")/ray" ]; then ray=$(realpath -s "$(dirname "$1")/ray"); fi
home=$(mktemp -d /tmp/tkv.XXXXXX)
export HOME=$home RAY_TMPDIR=$home RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ADDRESS=10.213.9.1:6379
declare -a inits=() programs=()

finish() {
    for init in "${inits[@]}"; do kill -9 "$init" 2> /dev/null || true; done
    wait 2> /dev/null || true
    for number in $(seq "$hosts"); do ip netns delete "$tag-$number" 2> /dev/null || true; done
    ip netns delete "$tag" 2> /dev/null || true
    rm -rf "$home"
}
trap finish EXIT
trap 'exit 130' INT TERM

# on NUMBER COMMAND...: run a command on a host
on() {
    local init=${inits[$1 - 1]}
    shift
    nsenter --target "$(tr -d " " < "/proc/$init/task/$init/children")" --net --pid --uts --ipc --mount "$@"
}

(umask 077; mkdir "$home/.ray"; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$home/.ray/auth_token")
ip netns add "$tag"
ip -n "$tag" link add switch type bridge
ip -n "$tag" link set switch up
for number in $(seq "$hosts"); do
    own=$tag-$number
    ip netns add "$own"
    ip link add eth0 netns "$own" type veth peer name "host$number" netns "$tag"
    ip -n "$tag" link set "host$number" master switch up
    ip -n "$own" address add "10.213.9.$number/24" dev eth0
    ip -n "$own" link set eth0 up
    ip -n "$own" link set lo up
    ip netns exec "$own" unshare --pid --uts --ipc --mount --mount-proc --fork --kill-child sh -c \
        "hostname host$number && mount -t tmpfs none /dev/shm && touch $home/up$number && exec sleep infinity" &
    inits+=($!)
    until [ -e "$home/up$number" ]; do sleep 0.1; done
    case $number in
        1) role=(--head --port 6379 --include-dashboard false) ;;
        *) role=(--address "$RAY_ADDRESS") ;;
    esac
    on "$number" "$ray" start "${role[@]}" --node-ip-address "10.213.9.$number" --object-store-memory 268435456 \
        > "$home/ray$number" 2>&1 || { cat "$home/ray$number" >&2; exit 1; }
done

export WORLD_SIZE=$hosts MASTER_ADDR=10.213.9.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0
for number in $(seq 2 "$hosts"); do
    RANK=$((number - 1)) on "$number" "$@" &
    programs+=($!)
done
status=0
RANK=0 on 1 "$@" || status=$?
for program in "${programs[@]}"; do wait "$program" || status=$?; done
exit "$status"
