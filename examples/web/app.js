// The page: strokes are streamed frame by frame into a model, and models are trained, saved and loaded. All arithmetic is in pkg/.

import init, { Examples, Model, ModelOptions, Training, TrainingOptions, simdLevel } from "./pkg/hymba_web.js";
import { classColour, drawLoss, drawStroke, drawTimeline, thumbnail } from "./charts.js";
import { FEWEST, Tracer, WIDTH, fitted, framesOf, generator, pointsOf, table, varied } from "./strokes.js";

const $ = (id) => document.getElementById(id);
/// Copies of an example that differ as hands do.
const VARIANTS = 4;
/// Milliseconds of training between two pictures.
const SLICE = 24;

let recorded; // { classes, train: [{ class, points }], test }
let classes = ["circle", "triangle", "zigzag"];
let examples = []; // { class, points }, by name
let chosen = 0; // the class that examples are added to
let mode = "recognise";
let model = null;
let stream = null;
let training = false;
let busy = false; // a gesture is played
let stroke = { points: [], tracer: null, history: [] };
let curve = [[], 0]; // the losses of the last training, and its steps
let slowest = 0; // milliseconds of a step

const nextPicture = () => new Promise((done) => (document.hidden ? setTimeout(done) : requestAnimationFrame(() => setTimeout(done))));

function say(text, wrong = false) {
    $("status").textContent = text;
    $("status").classList.toggle("wrong", wrong);
}

// ---- streaming

function beginStroke() {
    stream?.free();
    stream = mode === "recognise" && model ? model.stream() : null;
    stroke = { points: [], tracer: new Tracer(), history: [] };
    slowest = 0;
    $("verdict").textContent = "";
    $("hint").hidden = true;
}

function addPoint(point) {
    stroke.points.push(point);
    stroke.tracer.add(point).forEach(step);
    drawStroke($("board"), stroke.points);
}

/// A frame into the model.
function step(frame) {
    if (!stream) return;
    const begin = performance.now();
    const probabilities = stream.step(frame);
    slowest = Math.max(slowest, performance.now() - begin);
    stroke.history.push({ probabilities: [...probabilities], gates: [...stream.gates()] });
    showLive();
}

function endStroke() {
    const last = stroke.history.at(-1);
    if (mode === "record" && !busy) {
        const long = framesOf(stroke.points).length / WIDTH >= FEWEST;
        if (long) examples.push({ class: classes[chosen], points: stroke.points });
        showExamples();
    } else if (last && stroke.history.length >= FEWEST) {
        const best = last.probabilities.indexOf(Math.max(...last.probabilities));
        const [name, share] = [document.createTextNode(labelsOf(model)[best]), document.createElement("small")];
        share.textContent = `${Math.round(100 * last.probabilities[best])} %`;
        $("verdict").style.color = classColour(best);
        $("verdict").replaceChildren(name, share);
    } else {
        showHint();
    }
}

const labelsOf = (model) => (model.classes.length ? model.classes : Array.from({ length: 1 }, () => "value"));

function showLive() {
    const last = stroke.history.at(-1);
    const labels = model ? labelsOf(model) : classes;
    const best = last && last.probabilities.indexOf(Math.max(...last.probabilities));
    if ($("bars").childElementCount !== labels.length || $("bars").dataset.labels !== labels.join("\n")) {
        $("bars").dataset.labels = labels.join("\n");
        $("bars").replaceChildren(...labels.map((label, i) => row("li", "b", label, classColour(i))));
    }
    [...$("bars").children].forEach((item, i) => {
        item.classList.toggle("first", i === best);
        setRow(item, last?.probabilities[i]);
    });
    const gates = last?.gates ?? Array.from({ length: $("gates").childElementCount || 2 });
    if ($("gates").childElementCount !== gates.length) {
        $("gates").replaceChildren(...gates.map((_, i) => row("div", "span", `block ${i + 1}`, "")));
    }
    [...$("gates").children].forEach((item, i) => {
        item.querySelector(".track").classList.toggle("empty", gates[i] === undefined);
        setRow(item, gates[i]);
    });
    drawTimeline($("timeline"), stroke.history);
    const count = stroke.history.length;
    $("frames").textContent = count ? `${count} frames, slowest step ${slowest.toFixed(1)} ms` : "";
}

function row(kind, first, label, color) {
    const item = document.createElement(kind);
    item.innerHTML = `<${first}></${first}><span class="track"><i></i></span><span></span>`;
    item.firstElementChild.textContent = item.firstElementChild.title = label;
    item.querySelector("i").style.background = color;
    return item;
}

function setRow(item, share) {
    item.querySelector("i").style.width = `${100 * (share ?? 0)}%`;
    item.lastElementChild.textContent = share === undefined ? "" : `${Math.round(100 * share)} %`;
}

function showHint() {
    $("hint").hidden = false;
    $("hint").textContent =
        mode === "record"
            ? `Draw “${classes[chosen]}” in one stroke. Then again, a little differently.`
            : training
              ? "Training …"
              : model
                ? "Draw a gesture in one stroke."
                : "No model yet. Train one on the recorded gestures, or on examples of your own.";
    drawStroke($("board"), []);
}

// ---- drawing by hand

const board = $("board");
const place = (event) => {
    const { left, top, width } = board.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / width];
};
let pointer = null;

board.addEventListener("pointerdown", (event) => {
    if (busy || training || (mode === "recognise" && model && model.width !== WIDTH)) return;
    pointer = event.pointerId;
    board.setPointerCapture(pointer);
    beginStroke();
    addPoint(place(event));
});
board.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    (events.length ? events : [event]).forEach((event) => addPoint(place(event)));
});
for (const type of ["pointerup", "pointercancel"]) {
    board.addEventListener(type, (event) => {
        if (event.pointerId !== pointer) return;
        pointer = null;
        endStroke();
    });
}

function setMode(next) {
    mode = next;
    for (const name of ["recognise", "record"]) $(`mode-${name}`).setAttribute("aria-selected", String(name === mode));
    $("verdict").textContent = "";
    stroke.history = [];
    showHint();
    showExamples();
    showLive();
}

/// Streams a recorded signal, a point or a frame for each picture.
async function play(rows, add) {
    if (busy || training) return;
    if (mode !== "recognise") setMode("recognise");
    busy = true;
    beginStroke();
    for (const row of rows) {
        add(row);
        await nextPicture();
    }
    endStroke();
    busy = false;
}

// ---- examples

function showExamples() {
    $("classes").replaceChildren(
        ...classes.map((name, i) => {
            const mine = examples.filter((example) => example.class === name);
            const button = document.createElement("button");
            button.innerHTML = `${thumbnail(mine.at(-1)?.points ?? [[0.5, 0.5]])}<span><b></b><small></small></span>`;
            button.querySelector("b").textContent = name;
            button.querySelector("small").textContent = `${mine.length} example${mine.length === 1 ? "" : "s"}`;
            button.querySelector("svg").style.color = classColour(i);
            button.setAttribute("aria-pressed", String(mode === "record" && i === chosen));
            button.addEventListener("click", () => {
                chosen = i;
                setMode("record");
            });
            const item = document.createElement("li");
            item.append(button);
            return item;
        }),
    );
    const used = classes.filter((name) => examples.some((example) => example.class === name)).length;
    $("count").textContent = examples.length ? `${examples.length} in ${used} classes` : "";
    $("train").disabled = training || used < 2;
    $("train").title = used < 2 ? "Two classes with examples are needed" : "";
    for (const id of ["train-recorded", "clear", "mode-record", "mode-recognise"]) $(id).disabled = training || !recorded;
    $("save").disabled = training || !model;
    $("play").disabled = training || !model || !recorded || model.width !== WIDTH;
    $("recording").hidden = mode !== "record";
    $("recording").textContent = `What you draw is added to “${classes[chosen]}”. Ten of each class are plenty. Pick another class below.`;
}

$("add-class").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("class-name").value.trim();
    if (!name) return;
    if (!classes.includes(name)) classes.push(name);
    chosen = classes.indexOf(name);
    $("class-name").value = "";
    setMode("record");
});
$("clear").addEventListener("click", () => {
    [examples, classes, chosen] = [[], ["circle", "triangle", "zigzag"], 0];
    setMode(mode);
});

// ---- training

/// Trains a new model, and measures it on examples that it has not seen.
async function train(names, learned, heldOut) {
    training = true;
    document.body.dataset.state = "training";
    setMode("recognise");
    const set = (all, variants) => {
        const set = new Examples(names, WIDTH);
        for (const { class: name, points } of all) {
            for (let i = 0; i < variants; i++) set.add(names.indexOf(name), framesOf(i ? varied(points, random) : points));
        }
        return set;
    };
    const random = generator(0);
    const begin = performance.now();
    try {
        const options = new TrainingOptions();
        const run = new Training(set(learned, VARIANTS), new ModelOptions(), options);
        let [count, longest] = [1, 0];
        while (!run.done) {
            const start = performance.now();
            run.advance(count);
            const spent = performance.now() - start;
            longest = Math.max(longest, spent);
            count = Math.max(1, Math.floor((count * SLICE) / Math.max(spent, 1)));
            $("progress").value = run.step / run.steps;
            say(`Step ${run.step} of ${run.steps}`);
            curve = [run.losses, run.steps];
            drawLoss($("loss"), ...curve);
            await nextPicture();
        }
        model?.free();
        model = run.model();
        run.free();
        const seconds = (performance.now() - begin) / 1000;
        const measured = heldOut.length ? set(heldOut, 1).accuracy(model) : null;
        const right = measured === null ? "" : `${(100 * measured).toFixed(1)} % of ${heldOut.length} held-out right`;
        $("accuracy").textContent = right;
        $("accuracy").dataset.value = measured ?? "";
        say(`Trained on ${learned.length} gestures in ${seconds.toFixed(1)} s. ${model.numParameters.toLocaleString("en")} parameters; the longest slice took ${longest.toFixed(0)} ms.`);
    } catch (error) {
        say(error.message, true);
    }
    training = false;
    document.body.dataset.state = model ? "ready" : "empty";
    setMode("recognise");
}

$("train").addEventListener("click", () => {
    const names = classes.filter((name) => examples.some((example) => example.class === name));
    const [learned, heldOut] = [[], []];
    for (const name of names) {
        const mine = examples.filter((example) => example.class === name);
        // the fourth, eighth, … of a class is kept to test with
        mine.forEach((example, i) => (i % 4 === 3 ? heldOut : learned).push(example));
    }
    train(names, learned, heldOut);
});
$("train-recorded").addEventListener("click", () => {
    [classes, examples, chosen] = [[...recorded.classes], [...recorded.train], 0];
    train(recorded.classes, recorded.train, recorded.test);
});
$("play").addEventListener("click", () => {
    const known = recorded.test.filter((gesture) => labelsOf(model).includes(gesture.class));
    const pool = known.length ? known : recorded.test;
    play(pool[Math.floor(Math.random() * pool.length)].points, addPoint);
});
$("mode-recognise").addEventListener("click", () => setMode("recognise"));
$("mode-record").addEventListener("click", () => setMode("record"));

// ---- files

$("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([model.toBytes()], { type: "application/octet-stream" }));
    link.download = "gestures.safetensors";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

const gesturesOf = (json) => ({
    classes: json.classes,
    train: json.train.map(({ class: name, points }) => ({ class: name, points: pointsOf(points) })),
    test: (json.test ?? []).map(({ class: name, points }) => ({ class: name, points: pointsOf(points) })),
});

async function open(file) {
    try {
        if (file.name.endsWith(".safetensors")) {
            const loaded = Model.fromBytes(new Uint8Array(await file.arrayBuffer()));
            model?.free();
            model = loaded;
            document.body.dataset.state = "ready";
            $("accuracy").textContent = "";
            say(`${file.name}: ${model.numParameters.toLocaleString("en")} parameters, ${labelsOf(model).length} classes, frames of ${model.width} numbers.`);
            setMode("recognise");
            return;
        }
        const text = await file.text();
        const json = file.name.endsWith(".json") ? JSON.parse(text) : null;
        if (json?.classes && json.train) {
            const set = gesturesOf(json);
            [classes, examples, chosen] = [set.classes, [...set.train, ...set.test], 0];
            setMode("record");
            say(`${file.name}: ${examples.length} gestures. Train on them.`);
            return;
        }
        const rows = json ?? table(text);
        if (!model) throw new Error("There is no model yet that could read the signal. Train one first.");
        if (!Array.isArray(rows) || !rows.length) throw new Error(`${file.name} has no rows of numbers.`);
        if (model.width === WIDTH && rows[0].length === 2) await play(fitted(rows), addPoint);
        else await play(rows.map((row) => Float32Array.from(row)), step);
        say(`${file.name}: ${rows.length} rows streamed.`);
    } catch (error) {
        busy = false;
        say(error.message, true);
    }
}

$("load").addEventListener("change", async (event) => {
    for (const file of event.target.files) await open(file);
    event.target.value = "";
});
addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").hidden = false;
});
addEventListener("dragleave", (event) => ($("drop").hidden = event.relatedTarget === null));
addEventListener("drop", async (event) => {
    event.preventDefault();
    $("drop").hidden = true;
    for (const file of event.dataTransfer.files) await open(file);
});

// ---- the beginning

function redraw() {
    $("bars").replaceChildren();
    drawStroke(board, stroke.points);
    drawLoss($("loss"), ...curve);
    showExamples();
    showLive();
}
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

await init();
recorded = gesturesOf(await (await fetch("gestures.json")).json());
$("facts").textContent = `Rust compiled to WebAssembly (${simdLevel()}), one thread, no server.`;
say("Nothing is trained yet.");
document.body.dataset.state = "empty";
curve[1] = new TrainingOptions().steps;
drawLoss($("loss"), ...curve);
setMode("recognise");

/// For the page's test.
window.page = {
    recorded,
    predict: (points) => [...model.predict(framesOf(points))],
    /// The milliseconds that a step takes, of many: browsers' clocks are coarse.
    time(count) {
        const stream = model.stream();
        const frame = framesOf(recorded.test[0].points).subarray(0, WIDTH);
        const begin = performance.now();
        for (let i = 0; i < count; i++) stream.step(frame);
        const spent = performance.now() - begin;
        stream.free();
        return spent / count;
    },
};
