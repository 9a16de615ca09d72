#!/usr/bin/env bash
# What a machine with many cores does, in ten minutes, without a toolchain or a network there:
#
#     benches/many_cores.sh pack DIR     here: builds the programs, and puts them and the tests' data into DIR
#     benches/many_cores.sh run DIR      there (any Linux with this kind of CPU): tests, then one table
#
# Run: the kernels' tests on every instruction set that the CPU has (AMX included), the models' tests, `throughput` at 1, 2, 4, 8 and 16
# threads, and `hymba bench --random` in every storage. SECONDS_LEFT (600) bounds the whole: what does not fit is left out, which is said.
set -uo pipefail

usage() {
    sed -n '4,5s/^# *//p' "$0" >&2
    exit 2
}

pack() {
    cd "$(dirname "$0")/.." || exit
    mkdir -p "$1/tests"
    local messages programs
    cargo build --release --example throughput && cargo build --release -p hymba-cli || exit
    cp target/release/examples/throughput target/release/hymba "$1/"
    messages=$(cargo test --release --features lm --no-run --message-format json --lib \
        --test golden --test streaming --test determinism --test lm) || exit
    programs=$(python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"]:
        print(message["target"]["name"], message["executable"])' <<<"$messages")
    while read -r name program; do
        cp "$program" "$1/test_$name"
    done <<<"$programs"
    strip "$1"/throughput "$1"/hymba "$1"/test_*
    cp -r tests/data "$1/tests/"
    cp "$0" "$1/"
    du -sh "$1"
}

# $1: seconds that the next part may take; $2: what it is
in_time() {
    local left=$((${SECONDS_LEFT:-600} - SECONDS))
    ((left >= $1)) || { echo "left out, $left s are left: $2" >&2; return 1; }
}

# $1: a name; then the test program and its arguments
verdict() {
    local name=$1 start=$SECONDS output
    shift
    output=$(timeout 120 "$@" 2>&1) || { failed=1; tail -40 <<<"$output"; }
    echo "$name: $(grep -o '^test result: [^;]*; [^;]*' <<<"$output") ($((SECONDS - start)) s)"
}

throughput() {
    local level threads
    for level in avx2 avx512; do
        for threads in 1 2 4 8 16; do
            ((threads <= $(nproc))) && in_time 30 "throughput, $level, $threads threads" || continue
            HYMBA_SIMD=$level RAYON_NUM_THREADS=$threads timeout 60 ./throughput 2 |
                sed -E "s/.*\"case\": \"([a-z0-9]+)\".*\"ms_med\": ([0-9.]+).*/$level $threads \1 \2/"
        done
    done | awk '
        { row = $1 " " $2; ms[row, $3] = $4 }
        !(row in seen) { rows[++n] = row; seen[row] }
        !($3 in known) { cases[++c] = $3; known[$3] }
        END {
            printf "%-12s", "set threads"; for (i = 1; i <= c; i++) printf "%10s", cases[i]; print ""
            for (r = 1; r <= n; r++) { printf "%-12s", rows[r]; for (i = 1; i <= c; i++) printf "%10.2f", ms[rows[r], cases[i]]; print "" }
        }'
}

generate() {
    local threads storage
    for threads in 16 2 8; do
        ((threads <= $(nproc))) || continue
        for storage in "--quantize none" "--arithmetic bf16" "--quantize 8" "--quantize 4"; do
            in_time 45 "generate $storage, $threads threads" || continue
            # shellcheck disable=SC2086 # two words
            timeout 90 ./hymba bench --random $storage --threads $threads --tokens 16 >generate.out 2>&1 ||
                { failed=1; tail -5 generate.out; continue; }
            echo "$threads threads, $storage: $(sed -nE '
                s/^threads .*(\(.*\))/\1/p
                s/^prompt .*tokens, (.*);.*/prompt \1,/p
                s/^decoding +(.*) \(.*/decoding \1,/p
                s/^limit.*which (.*) were.*/\1 of reading memory/p' generate.out | tr '\n' ' ')($SECONDS s)"
        done
    done
}

run() {
    cd "$1" || exit
    failed=0
    echo "CPU: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores"
    echo "instructions: $(grep -m1 '^flags' /proc/cpuinfo | grep -oE ' (avx2|fma|avx_vnni|avx512(f|bw|_vnni|_bf16)|amx_(tile|bf16|int8))\b' | tr -d '\n')"

    echo; echo "== tests of the kernels, on every instruction set in one process, and of the models on the best one"
    verdict kernels ./test_hymba kernels::
    for name in golden streaming determinism lm; do verdict "$name" ./test_$name; done

    echo; echo "== throughput, ms (medians of 2 rounds)"
    throughput

    echo; echo "== language model of 1.5 billion random weights, prompt of 512 tokens"
    generate

    echo; echo "== tests of the models on the other instruction sets"
    for level in avx512 avx2 scalar; do
        for name in golden streaming determinism lm; do
            in_time 45 "$name $level" && HYMBA_SIMD=$level verdict "$name, HYMBA_SIMD=$level" "./test_$name"
        done
    done
    echo; echo "$SECONDS s in all; $([[ $failed = 0 ]] && echo "all tests passed" || echo "SOMETHING FAILED")"
    return "$failed"
}

[[ $# = 2 ]] || usage
case $1 in
    pack) pack "$2" ;;
    run) run "$2" ;;
    *) usage ;;
esac
