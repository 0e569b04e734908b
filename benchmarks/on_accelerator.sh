#!/usr/bin/env bash
# One sitting on an accelerator: benchmarks/on_accelerator.sh FOLDER [options of accelerator/run.py].
#
# Each part writes its rows to FOLDER/rows.jsonl as it measures them, and has a limit of its own. A part that FOLDER has
# already is left out, so a second sitting goes on where the first one ended. Nothing is started that cannot end within
# SECONDS_IN_ALL (540). Needed: torch for the device, and the packages of setup.cfg's extra "train" for $PYTHON (python3); no
# network. The open horizon needs neither datasets nor matplotlib.
# Afterwards, anywhere: python benchmarks/accelerator/run.py report --folder FOLDER, and
# python benchmarks/open_horizon/analyse.py FOLDER/open_horizon
set -u
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?"the folder for the rows is missing: benchmarks/on_accelerator.sh FOLDER"}
shift
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
end=$((SECONDS + ${SECONDS_IN_ALL:-540}))
failed=0
dry=false
[[ " $* " == *" --dry_run "* ]] && dry=true
mkdir -p "$folder"

# The most valuable part comes first. The number is the limit of a part in seconds.
while read -r part limit; do
    $dry && limit=$((10 * limit)) # on a CPU, beside other work
    left=$((end - SECONDS))
    if ((left < 20)); then
        echo "no time is left for $part" | tee -a "$folder/log.txt"
        continue
    fi
    ((left < limit)) && limit=$left
    echo "== $part, at most $limit s"
    timeout "$limit" "${PYTHON:-python3}" "$here/accelerator/run.py" "$part" --folder "$folder" "$@" 2>&1 < /dev/null |
        grep --line-buffered -v "examples/s" | tee -a "$folder/log.txt"
    status=${PIPESTATUS[0]}
    if ((status)); then
        echo "$part ended with $status" | tee -a "$folder/log.txt"
        failed=1
    fi
done <<PARTS
dense 200
sweep 120
moe 150
host 80
profile 80
resume 120
coordinates 90
PARTS

# The open horizon's runs of size `gpu` begin nothing that cannot end in time, and go on in the next sitting; dry, they are the toy.
left=$((end - SECONDS))
if ((left > 40)); then
    echo "== open_horizon, at most $left s"
    toy=()
    $dry && toy=(--toy)
    timeout "$left" "${PYTHON:-python3}" "$here/open_horizon/run.py" gpu --folder "$folder/open_horizon" --seconds $((left - 10)) "${toy[@]}" 2>&1 < /dev/null |
        tee -a "$folder/log.txt"
    if ((PIPESTATUS[0])); then
        failed=1
    fi
fi

# What is left goes to the transfer table's runs of size `gpu`, which take several sittings: FOLDER/transfer.tgz is what they
# have made so far.
left=$((end - SECONDS))
if ((left > 40)) && ! $dry; then
    [ -f "$folder/transfer.tgz" ] && tar xzf "$folder/transfer.tgz" -C "$folder"
    echo "== transfer, at most $((left - 5)) s"
    timeout $((left - 5)) "${PYTHON:-python3}" "$here/transfer/run.py" gpu --folder "$folder/transfer" > "$folder/transfer.log" 2>&1 < /dev/null
    tar czf "$folder/transfer.tgz" -C "$folder" transfer && rm -rf "$folder/transfer"
    wc -c "$folder/transfer.tgz"
fi
exit $failed
