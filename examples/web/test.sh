#!/usr/bin/env bash
# Tests the library as WebAssembly in Node, with and without vector instructions, and the page in Chromium. Installs what it needs
# (with apt-get, where it may), and says loudly what cannot be had.
# usage: test.sh [folder]     folder: for screenshots of the page
set -euo pipefail
cd "$(dirname "$0")"

target=wasm32-unknown-unknown
left_out() {
    printf '\n!!! %s cannot be had: %s left out\n\n' "$1" "$2" >&2
    exit 0
}
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1; }

rustc --print target-libdir --target $target | xargs test -d || rustup target add $target ||
    left_out "the standard library for $target" "wasm tests and the page's test"
command -v node >/dev/null || install nodejs || left_out Node.js "wasm tests and the page's test"

cargo fmt --check
./build.sh
# at most 1 MB
test "$(wc -c <pkg/hymba_web_bg.wasm)" -le 1000000

for features in +simd128 -simd128; do
    RUSTFLAGS="-C target-feature=$features" CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUNNER=wasm-bindgen-test-runner \
        cargo test --target $target --target-dir "target/test$features" --test library
done

# the kernels' own tests, against the scalar ones; wasip1 has what their harness needs
if rustup target add wasm32-wasip1; then
    RUSTFLAGS='-C target-feature=+simd128' CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings $PWD/wasi.mjs" \
        cargo test --manifest-path ../../Cargo.toml --target wasm32-wasip1 --target-dir target/wasi --no-default-features --lib \
        -- kernels:: --skip team --skip limits
else
    printf '\n!!! the standard library for wasm32-wasip1 cannot be had: the kernels are NOT tested with vector instructions\n\n' >&2
fi

command -v npm >/dev/null || install npm || left_out npm "the page's test"
test -d node_modules/playwright-core || npm install --no-save --no-package-lock playwright-core ||
    left_out playwright-core "the page's test"
command -v chromium >/dev/null || install chromium || left_out Chromium "the page's test"
node test.mjs "$@"
