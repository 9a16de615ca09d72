// The page, in Chromium: it loads, trains, recognises, saves and loads again.
//
//     node test.mjs [folder]     folder: for screenshots

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { inChromium } from "./chromium.mjs";

const folder = process.argv[2];
if (folder) mkdirSync(folder, { recursive: true });
const gestures = JSON.parse(readFileSync(new URL("gestures.json", import.meta.url)));
const WAIT = { timeout: 180_000 };

await inChromium(async (browser, address) => {
    const page = await browser.newPage({ viewport: { width: 1180, height: 1240 } });
    const errors = [];
    page.on("pageerror", (error) => errors.push(error.message));
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    const shot = (name, options) => folder && page.screenshot({ path: `${folder}/${name}.png`, ...options });
    const state = (name) => page.waitForSelector(`body[data-state="${name}"]`, WAIT);
    const text = (selector) => page.textContent(selector);
    const file = (name, text) => page.setInputFiles("#load", { name, mimeType: "text/plain", buffer: Buffer.from(text) });

    /// Draws a recorded gesture with the mouse.
    const draw = async (gesture) => {
        const { x, y, width } = await page.locator("#board").boundingBox();
        const at = (i) => [x + (width * gesture.points[2 * i]) / 1000, y + (width * gesture.points[2 * i + 1]) / 1000];
        await page.mouse.move(...at(0));
        await page.mouse.down();
        for (let i = 1; i < gesture.points.length / 2; i++) await page.mouse.move(...at(i));
        await page.mouse.up();
    };

    // it loads, and says that there is nothing yet
    await page.goto(address);
    await state("empty");
    assert.match(await text("#facts"), /simd128/);
    assert.match(await text("#hint"), /No model yet/);
    assert(await page.isDisabled("#save"));
    await shot("empty");

    // it trains on the recorded gestures, and stays alive meanwhile
    await page.click("#train-recorded");
    await state("training");
    await page.waitForFunction(() => document.getElementById("progress").value > 0.4, null, WAIT);
    assert.match(await text("#status"), /Step \d+ of \d+/);
    await shot("training");
    await state("ready");
    const accuracy = Number(await page.getAttribute("#accuracy", "data-value"));
    console.log(await text("#status"), await text("#accuracy"));
    assert(accuracy > 0.9, `${accuracy} of the held-out gestures`);

    // it recognises what is drawn
    let right = 0;
    const firsts = gestures.classes.map((name) => gestures.test.find((gesture) => gesture.class === name));
    for (const gesture of firsts) {
        await draw(gesture);
        right += (await text("#verdict")).startsWith(gesture.class);
    }
    console.log(`drawn with the mouse: ${right} of ${firsts.length} right; ${await text("#frames")}`);
    assert(right >= 7);
    await shot("ready");
    const milliseconds = await page.evaluate(() => window.page.time(500));
    console.log(`a step takes ${milliseconds.toFixed(2)} ms`);
    assert(milliseconds < 16);

    // it plays a recorded one
    await page.click("#play");
    await page.waitForFunction(() => document.getElementById("verdict").textContent !== "", null, WAIT);

    // it saves the model, and a new page that loads it predicts the same
    const predictions = () => page.evaluate(() => window.page.recorded.test.map(({ points }) => window.page.predict(points)));
    const before = await predictions();
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
    const saved = await download.path();
    await page.reload();
    await state("empty");
    await page.setInputFiles("#load", { name: download.suggestedFilename(), mimeType: "application/octet-stream", buffer: readFileSync(saved) });
    await state("ready");
    assert.deepEqual(await predictions(), before);

    // a recorded signal is streamed; what cannot be read is said
    const signal = firsts[0].points.map((x, i) => x + (i % 2 ? "\n" : ",")).join("");
    await file("signal.csv", `x,y\n${signal}`);
    await page.waitForFunction(() => document.getElementById("verdict").textContent !== "", null, WAIT);
    assert.match(await text("#verdict"), new RegExp(`^${firsts[0].class}`));
    await file("broken.safetensors", "not a model");
    await page.waitForSelector("#status.wrong", WAIT);

    // it learns what is drawn
    await page.click("#clear");
    for (const name of ["zigzag", "loop"]) {
        await page.fill("#class-name", name);
        await page.press("#class-name", "Enter");
        const like = gestures.train.filter((gesture) => gesture.class === (name === "loop" ? "circle" : name));
        for (const gesture of like.slice(0, 8)) await draw(gesture);
    }
    assert.match(await text("#count"), /16 in 2 classes/);
    await shot("examples");
    await page.click("#train");
    await state("training");
    await state("ready");
    assert.equal(await page.getAttribute("#accuracy", "data-value"), "1");
    await draw(firsts[gestures.classes.indexOf("circle")]);
    assert.match(await text("#verdict"), /^loop/);

    // dark, and on a phone
    await page.emulateMedia({ colorScheme: "dark" });
    await file("gestures.json", JSON.stringify(gestures));
    await page.click("#mode-recognise");
    await draw(firsts[0]);
    await shot("dark");
    await page.setViewportSize({ width: 390, height: 844 });
    await page.waitForTimeout(200);
    await draw(firsts[0]);
    await shot("phone", { fullPage: true });
    assert(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "it scrolls sideways");

    assert.deepEqual(errors, []);
    console.log("the page does what it should");
});
