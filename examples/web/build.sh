#!/usr/bin/env bash
# Builds the npm package that the page imports: pkg/, with the WebAssembly, its JavaScript and its types.
# usage: build.sh [scalar]     scalar: without vector instructions, into pkg-scalar/, to compare with
set -euo pipefail
cd "$(dirname "$0")"

target=wasm32-unknown-unknown
out=pkg
# code that is not worth its size stays where it is called; kernels are inlined whatever this says
flags=(-C llvm-args=-inline-threshold=10 -C llvm-args=-inlinehint-threshold=60)
# no places of this machine in the messages of panics, which would also make the size depend on them
flags+=("--remap-path-prefix=$(cd ../.. && pwd)=hymba")
cargo fetch --target $target
for sources in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do
    flags+=("--remap-path-prefix=$sources=")
done
if [ "${1:-}" = scalar ]; then
    out=pkg-scalar
else
    flags+=(-C target-feature=+simd128)
fi

rustc --print target-libdir --target $target | xargs test -d || rustup target add $target
# the program must be of the library's version
version=$(sed -n '/^name = "wasm-bindgen"$/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)
if [ "$(wasm-bindgen --version 2>/dev/null)" != "wasm-bindgen $version" ]; then
    cargo install wasm-bindgen-cli --version "$version"
fi

# not RUSTFLAGS, which would cut a path with spaces
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f' && echo "${flags[*]}") cargo build --release --lib --target $target --target-dir "target/$out"
rm -rf "$out"
wasm-bindgen --target web --remove-name-section --remove-producers-section --out-dir "$out" "target/$out/$target/release/hymba_web.wasm"
cp package.json README.md "$out"
echo "$out/hymba_web_bg.wasm: $(wc -c <"$out/hymba_web_bg.wasm") bytes"
