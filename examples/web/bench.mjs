// Milliseconds of a pass of the default model (256 wide, 4 blocks) over 1 × 60 frames, in Node and in Chromium, with vector
// instructions and without. Needs ./build.sh, ./build.sh scalar, and npm install.

import { readFileSync } from "node:fs";
import { inChromium } from "./chromium.mjs";

/// The best and the median of some passes.
function measure({ Model, ModelOptions, simdLevel }) {
    const [model, x] = [Model.untrained(["a", "b"], 256, ModelOptions.large()), new Float32Array(60 * 256).map((_, i) => Math.sin(i))];
    const times = Array.from({ length: 40 }, () => {
        const begin = performance.now();
        model.predict(x);
        return performance.now() - begin;
    });
    times.sort((a, b) => a - b);
    return `${simdLevel().padEnd(8)} best ${times[0].toFixed(1)} ms, median ${times[20].toFixed(1)} ms`;
}

const packages = ["pkg", "pkg-scalar"];
for (const name of packages) {
    const module = await import(`./${name}/hymba_web.js`);
    module.initSync({ module: readFileSync(new URL(`${name}/hymba_web_bg.wasm`, import.meta.url)) });
    console.log(`Node ${process.versions.node}: ${measure(module)}`);
}
await inChromium(async (browser, address) => {
    const page = await browser.newPage();
    await page.goto(address);
    for (const name of packages) {
        const line = await page.evaluate(`(async () => {
            const module = await import("./${name}/hymba_web.js");
            await module.default();
            return (${measure})(module);
        })()`);
        console.log(`Chromium ${browser.version()}: ${line}`);
    }
});
