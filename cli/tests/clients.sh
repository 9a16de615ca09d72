#!/usr/bin/env bash
# Tests the program at a terminal, and the server with the openai package and lm_eval, which it installs into target/clients. Left out
# where that cannot be.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=target/clients
left_out() {
    echo "!! NOT tested: $*"
    exit 0
}
command -v python3 >/dev/null || left_out "the program at a terminal, and the server with real clients: there is no python3"
cargo build --release --all-features -p hymba -p hymba-cli
python3 cli/tests/terminal.py target/release/hymba
[ -x $venv/bin/python ] || python3 -m venv $venv || left_out "the server with real clients: python3 has no venv"
# neither needs torch for this
$venv/bin/python -c 'import openai, lm_eval, transformers, aiohttp, tenacity' 2>/dev/null ||
    $venv/bin/pip install --quiet openai 'lm_eval[api]' transformers || left_out "the server with real clients: the Python packages cannot be had"
HYMBA_PYTHON=$PWD/$venv/bin/python cargo test --release --all-features -p hymba -p hymba-cli --test server clients:: -- --nocapture
