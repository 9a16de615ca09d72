// Makes gestures.json: gestures as a hand might draw them, 16 to learn from and 5 to test with for each of 8 classes.
//
//     node gestures.mjs > gestures.json
//
// Points are x, y, x, y, …, in thousandths of the square they are drawn in, y pointing down.

import { generator } from "./strokes.js";

const CLASSES = ["circle", "triangle", "square", "zigzag", "wave", "line", "spiral", "check"];
const [TRAIN, TEST] = [16, 5];

const random = generator(16);
const between = (low, high) => low + (high - low) * random();
const coin = () => random() < 0.5;

const polygon = (corners) => (t) => {
    const at = Math.min(t, 1 - 1e-9) * (corners.length - 1);
    const [a, b] = [corners[Math.floor(at)], corners[Math.floor(at) + 1]];
    return [0, 1].map((i) => a[i] + (b[i] - a[i]) * (at % 1));
};
const jittered = (corners) => corners.map((corner) => corner.map((x) => x + between(-0.12, 0.12)));
const closed = (corners) => {
    const [first, turn] = [Math.floor(between(0, corners.length)), coin()];
    const order = [...corners.slice(first), ...corners.slice(0, first)];
    if (turn) order.reverse();
    return polygon(jittered([...order, order[0]]));
};

// each a curve from t = 0 to 1 in about [-1, 1]²
const SHAPES = {
    circle() {
        const [start, turns, way] = [between(0, 2 * Math.PI), between(0.92, 1.08), coin() ? 1 : -1];
        return (t) => [Math.cos(start + way * turns * 2 * Math.PI * t), Math.sin(start + way * turns * 2 * Math.PI * t)];
    },
    triangle: () => closed([[0, -1], [0.95, 0.8], [-0.95, 0.8]]),
    square: () => closed([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]),
    zigzag() {
        const [teeth, up] = [4 + Math.floor(between(0, 3)), coin() ? 1 : -1];
        return polygon(jittered(Array.from({ length: teeth + 1 }, (_, i) => [-1 + (2 * i) / teeth, i % 2 ? 0.6 * up : -0.6 * up])));
    },
    wave() {
        const [periods, phase] = [between(1.6, 2.6), between(0, 2 * Math.PI)];
        return (t) => [2 * t - 1, 0.5 * Math.sin(phase + periods * 2 * Math.PI * t)];
    },
    line() {
        const angle = between(0, 2 * Math.PI);
        const bend = between(-0.08, 0.08);
        return (t) => {
            const [along, across] = [2 * t - 1, bend * Math.sin(Math.PI * t)];
            return [along * Math.cos(angle) - across * Math.sin(angle), along * Math.sin(angle) + across * Math.cos(angle)];
        };
    },
    spiral() {
        const [start, turns, way] = [between(0, 2 * Math.PI), between(2, 2.6), coin() ? 1 : -1];
        return (t) => {
            const angle = start + way * turns * 2 * Math.PI * t;
            return [(0.1 + 0.9 * t) * Math.cos(angle), (0.1 + 0.9 * t) * Math.sin(angle)];
        };
    },
    check: () => polygon(jittered([[-0.9, 0.1], [-0.3, 0.8], [0.9, -0.9]])),
};

// a shape of some size, place, slant and stretch, with a hand's tremor
function draw(name) {
    const curve = SHAPES[name]();
    const [size, stretch, slant] = [between(180, 330), between(0.85, 1.15), between(-0.25, 0.25)];
    const [x0, y0] = [between(400, 600), between(400, 600)];
    const [cos, sin] = [Math.cos(slant), Math.sin(slant)];
    const tremor = Array.from({ length: 6 }, (_, i) => [between(0, 6 / (i + 1)), between(0, 6.3), between(0, 6 / (i + 1)), between(0, 6.3)]);
    const count = name === "spiral" ? 60 : name === "line" ? 16 : 40;
    const pace = between(-0.1, 0.1); // quicker at the end or at the beginning
    const points = [];
    for (let i = 0; i <= count; i++) {
        const at = i / count;
        const t = at + pace * at * (1 - at);
        let [x, y] = curve(t);
        [x, y] = [size * stretch * x, (size / stretch) * y];
        tremor.forEach(([a, p, b, q], k) => {
            x += a * Math.sin(p + 2.7 * (k + 1) * t * Math.PI);
            y += b * Math.sin(q + 3.1 * (k + 1) * t * Math.PI);
        });
        points.push(Math.round(x0 + cos * x - sin * y), Math.round(y0 + sin * x + cos * y));
    }
    return points.map((x) => Math.min(1000, Math.max(0, x)));
}

const gestures = (count) => CLASSES.flatMap((name) => Array.from({ length: count }, () => ({ class: name, points: draw(name) })));
const lines = (all) => all.map((gesture) => `    ${JSON.stringify(gesture)}`).join(",\n");
console.log(`{\n  "classes": ${JSON.stringify(CLASSES)},\n  "train": [\n${lines(gestures(TRAIN))}\n  ],\n  "test": [\n${lines(gestures(TEST))}\n  ]\n}`);
