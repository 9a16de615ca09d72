#!/usr/bin/env bash
# Two ranks of one thread against one process with two threads, on the same two cores: the same training of an encoder of the default
# width and depth on JapaneseVowels, in turns. Of each run all epochs but the first are counted. It needs a machine on which nothing else
# runs, and takes two to three minutes.
#
#   mpi/bench.sh [ROUNDS [EPOCHS [WIDTH [LAYERS]]]]
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-4} epochs=${2:-3} width=${3:-256} layers=${4:-4}
[ "$epochs" -ge 2 ] || { echo "mpi/bench.sh: the first epoch is not counted: 2 at least" >&2; exit 1; }

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# as mpi/test.sh does, so that nothing is built twice
cargo build --release --all-features -p hymba -p hymba-mpi --bin hymba-mpi --example faults --example waves
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
train=(target/release/hymba-mpi train examples/data/JapaneseVowels_TRAIN.ts --plain --hidden "$width" --layers "$layers"
    --batch 32 --epochs "$epochs")
run() { # threads or ranks, the round
    local of=("${train[@]}" --out "$out/$1.$2")
    if [ "$1" = threads ]; then
        RAYON_NUM_THREADS=2 taskset -c 0,1 "${of[@]}"
    else
        taskset -c 0,1 mpirun --bind-to none --oversubscribe -n 2 -x RAYON_NUM_THREADS=1 "${of[@]}"
    fi | tr -d ',' | awk '/^epoch/ { print $2 + 0, $4, $(NF - 1) }' >"$out/$1.$2.txt" # epoch, loss, series in a second
    rm -rf "$out/$1.$2"
}
for ((i = 1; i <= rounds; i++)); do
    # who is the first alternates
    if ((i % 2)); then run threads "$i"; run ranks "$i"; else run ranks "$i"; run threads "$i"; fi
done

medians=()
for kind in threads ranks; do
    mapfile -t paces < <(cat "$out/$kind".*.txt | awk '$1 > 1 { print $3 }' | sort -g)
    count=${#paces[@]}
    median=$(echo "${paces[(count - 1) / 2]} ${paces[count / 2]}" | awk '{ print ($1 + $2) / 2 }')
    medians+=("$median")
    echo "2 $kind: $median series/s, the median of $count epochs; least ${paces[0]}, most ${paces[count - 1]}"
done
echo "${medians[@]}" | awk '{ printf "ranks / threads: %.3f\n", $2 / $1 }'
for file in "$out"/*.txt; do paste "$out/threads.1.txt" "$file"; done | awk '
    BEGIN { most = 0 }
    { off = $2 - $5; off = off < 0 ? -off : off; most = off > most ? off : most }
    $1 != $4 { most = "an epoch" }
    END { agree = most + 0 == most && most < 1e-4
          printf "losses of all epochs and runs: off by %s at most: they %s\n", most, agree ? "agree" : "DO NOT AGREE"
          exit !agree }'
