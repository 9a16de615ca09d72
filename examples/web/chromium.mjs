// Chromium without a window, and a server of this folder.

import { createServer } from "node:http";
import { existsSync, readFileSync } from "node:fs";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const here = fileURLToPath(new URL(".", import.meta.url));
const types = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".json": "application/json", ".wasm": "application/wasm" };

const server = createServer((request, response) => {
    const path = normalize(new URL(request.url, "http://localhost").pathname);
    const file = join(here, path === "/" ? "index.html" : path);
    if (!existsSync(file)) return response.writeHead(404).end();
    response.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
});

/// Calls `f` with a browser and the page's address.
export async function inChromium(f) {
    await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
    const executablePath = ["chromium", "chromium-browser", "google-chrome"].map((name) => `/usr/bin/${name}`).find(existsSync);
    const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
    try {
        await f(browser, `http://127.0.0.1:${server.address().port}/`);
    } finally {
        await browser.close();
        server.close();
    }
}
