#!/bin/sh
# Train the tables on a machine with a GPU, in any checkout of camcal, without installing it and without a network.
#
#   sh tests/benchmarks/gpu_tables.sh OUT TABLE SOURCE=PATH … [-- --only cifar100-lt --jobs 8]
#
# TABLE is short or full (tests/benchmarks/tables/), or a file. OUT gets one JSON a run; what training leaves is in OUT/runs.
# The same command goes on after an interruption. Set CAMCAL_COMMIT where the checkout has no history, PYTHON to choose
# an interpreter (it needs torch, torchvision, numpy, pydantic, rich, safetensors, typer), and ARCHIVE=FOLDER to get
# everything in few files: results.tar.gz, and networks-N.tar of at most 15 MB each.
set -eu
out=$1 table=$2
shift 2
sources=""
while [ $# -gt 0 ]; do
    [ "$1" = -- ] && { shift; break; }
    sources="$sources --data $1"
    shift
done
here=$(cd "$(dirname "$0")/../.." && pwd)
[ -f "$table" ] || table=$here/tests/benchmarks/tables/$table.toml
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

archive() {
    [ -n "${ARCHIVE:-}" ] || return 0
    mkdir -p "$ARCHIVE"
    (cd "$out" && tar -czf "$ARCHIVE/results.tar.gz" -- *.json runs/*/report.json runs/*/log.txt 2>/dev/null) || true
    # Calibrated networks, several to a file; a ResNet-32 has 1.9 MB.
    (cd "$out" && ls runs/*/network.safetensors 2>/dev/null) | split -l 7 - "$ARCHIVE/list." || true
    n=0
    for list in "$ARCHIVE"/list.*; do
        [ -f "$list" ] || continue
        [ "$n" -lt 6 ] && (cd "$out" && tar -cf "$ARCHIVE/networks-$n.tar" -T "$list")
        rm -f "$list"
        n=$((n + 1))
    done
}
trap archive EXIT

# A child in the background, so that the traps above run at once when this script is told to stop.
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m camcal \
    bench-table "$table" --out "$out" $sources "$@" &
child=$!
trap 'kill "$child" 2>/dev/null; exit 143' TERM INT
wait "$child"
