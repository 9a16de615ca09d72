// Runs a program for wasm32-wasip1 in Node, with the folder it is started in: what cargo starts tests by.
//
//     CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings …/wasi.mjs"

import { readFileSync } from "node:fs";
import { WASI } from "node:wasi";

const [program, ...rest] = process.argv.slice(2);
const wasi = new WASI({ version: "preview1", args: [program, ...rest], env: process.env, preopens: { ".": process.cwd() } });
const { instance } = await WebAssembly.instantiate(readFileSync(program), wasi.getImportObject());
process.exitCode = wasi.start(instance);
