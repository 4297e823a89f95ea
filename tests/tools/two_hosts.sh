#!/usr/bin/env bash
# Two machines without a shared disk give the curve of one process, even if their paths differ.
#
#     tests/tools/two_hosts.sh            # as root, on Linux, with iproute2; two minutes
#
# The machines are two network namespaces joined by a cable. Each has a copy of this repository at a
# path of its own, and does not see the other's. Four ways to a teacher are tried: it is on both
# machines; it is the sample's, which the machines make; the first machine has made that before; it
# is made of TEACHER_BASE. The table shows the greatest difference of a loss in history.csv from a
# run in one process. The exit status is 0 if all are below 3e-8, 1 if not, 2 if this machine cannot
# run it. Dropout is 0 throughout: each process would draw its own.
set -euo pipefail
given=${PYTHON:-python}
PYTHON=$(command -v "$given" || true)
[[ $PYTHON != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
export PYTHON OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

cannot() {
    echo "two_hosts.sh: cannot run here: $1"
    exit 2
}
[[ $(uname) == Linux ]] || cannot "network namespaces need Linux"
[[ $(id -u) == 0 ]] || cannot "network namespaces need root"
command -v ip > /dev/null || cannot "the program ip is missing (apt-get install iproute2)"
"$PYTHON" -c "import torch" 2> /dev/null ||
    cannot "$given is missing or has no torch; name another in PYTHON"

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
first=two-hosts-$$-1 second=two-hosts-$$-2 # names of the namespaces
declare -A home=([one]=$work/one [$first]=$work/machine1/distill [$second]=$work/elsewhere/2/repo)
started=()

clean_up() {
    for pid in "${started[@]}"; do
        kill "$pid" 2> /dev/null || true
    done
    wait
    ip netns del "$first" 2> /dev/null || true
    ip netns del "$second" 2> /dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# ── The machines ──

ip netns add "$first" 2> /dev/null || cannot "ip netns add is not allowed"
ip netns add "$second" 2> /dev/null || cannot "ip netns add is not allowed"
ip -n "$first" link add cable type veth peer name cable netns "$second" 2> /dev/null ||
    cannot "ip link add type veth is not allowed"
for host in 1:$first 2:$second; do
    ip -n "${host#*:}" address add "10.77.0.${host%:*}/24" dev cable
    ip -n "${host#*:}" link set cable up
    ip -n "${host#*:}" link set lo up
done

# ── What each of them has ──

for host in one "$first" "$second"; do
    mkdir -p "${home[$host]}"
    cp -r "$root/distill.py" "$root/tests" "${home[$host]}"
    (
        cd "${home[$host]}" &&
            sed -i 's/\(dropout_prob": \)0.1/\10.0/' tests/sample/base/config.json &&
            PYTHONPATH=tests "$PYTHON" - 2> "$work/models.txt" << 'END'
from conftest import save_model
without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
save_model("teacher", **without_dropout)
save_model("base", seed=3, initializer_range=0.02, **without_dropout)
END
    ) || {
        cat "$work/models.txt"
        exit 1
    }
done

# ── The runs ──

options=(--epochs 2 --train-fraction 0.1 --max-length 64 --augment 0)
failed=0

on_machine() { # NAMESPACE NUMBER OPTIONS…: one machine of the two; the other's files are hidden
    local host=$1 number=$2 other=$first
    [[ $host == "$first" ]] && other=$second
    shift 2
    # shellcheck disable=SC2016
    HIDDEN=${home[$other]} PLACE=${home[$host]} GLOO_SOCKET_IFNAME=cable \
        ip netns exec "$host" bash -c '
            mount -t tmpfs none "$HIDDEN" && cd "$PLACE" && exec "$PYTHON" -m torch.distributed.run \
                --nnodes 2 --node_rank '"$number"' --nproc_per_node 1 \
                --master_addr 10.77.0.1 --master_port 29500 distill.py "$@"' bash "$@" \
        > "$work/log.$number" 2>&1 &
    started+=($!)
}

show() { # WHAT NAME OPTIONS…: run it both ways, print a line of the table
    local what=$1 name=$2 seconds=$SECONDS ok=1
    shift 2
    local settings=("${options[@]}" --output "output-$name" --cache "cache-$name" "$@")
    started=()
    on_machine "$first" 0 "${settings[@]}"
    # the same cache by its absolute path, as paths may differ between machines
    on_machine "$second" 1 "${settings[@]}" --cache "${home[$second]}/cache-$name"
    for pid in "${started[@]}"; do
        wait "$pid" || ok=0
    done
    started=()
    (cd "${home[one]}" && "$PYTHON" distill.py "${settings[@]}") \
        > "$work/log.one" 2>&1 || ok=0
    if [[ $ok == 1 ]]; then
        "$PYTHON" - "$what" $((SECONDS - seconds)) \
            "${home[one]}/output-$name" "${home[$first]}/output-$name" << 'END' || ok=0
import csv, sys
what, seconds, *folders = sys.argv[1:]
curves = []
for folder in folders:
    with open(f"{folder}/history.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curves.append([float(row[name]) for row in rows for name in ("train_loss", "val_loss")])
one, two = curves
difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
print(f"{what:<34}{len(one) // 2:>7}{one[-1]:>10.4f}{difference:>13.1e}{seconds:>9}", flush=True)
sys.exit(not difference < 3e-8)
END
    fi
    if [[ $ok == 0 ]]; then
        echo "$what: failed"
        tail -n 40 "$work"/log.*
        failed=1
    fi
}

printf '%-34s%7s%10s%13s%9s\n' teacher epochs 'val loss' difference seconds
show "on both machines" both --teacher teacher
show "the sample's, not yet made" sample
for host in one "$first"; do
    mkdir "${home[$host]}/cache-before"
    cp -r "${home[$host]}"/cache-sample/{sample_teacher*,CACHEDIR.TAG} "${home[$host]}/cache-before"
done
show "the sample's, made before on one" before
show "made of TEACHER_BASE" base --teacher made --teacher-base base
exit "$failed"
