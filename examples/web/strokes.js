// Strokes, as lists of points [x, y] in a square from 0 to 1, and the frames that a model reads of them.

/// Numbers in a frame: the direction of the last piece of the way, how far it turned from the one before, and how far from the
/// beginning it led.
export const WIDTH = 5;
/// A frame for every such piece of the way, so that the speed of the hand does not matter.
const PIECE = 1 / 20;
/// Strokes of fewer frames are taken for a slip.
export const FEWEST = 5;

/// Makes frames while points come in.
export class Tracer {
    constructor() {
        this.start = this.last = this.direction = null;
    }

    /// The next point → the frames that it completes, each a Float32Array.
    add([x, y]) {
        if (!this.last) {
            this.start = this.last = [x, y];
            return [];
        }
        const frames = [];
        for (;;) {
            const [dx, dy] = [x - this.last[0], y - this.last[1]];
            const distance = Math.hypot(dx, dy);
            if (distance < PIECE) return frames;
            const [cos, sin] = [dx / distance, dy / distance];
            this.last = [this.last[0] + PIECE * cos, this.last[1] + PIECE * sin];
            const [c, s] = this.direction ?? [cos, sin];
            const away = Math.hypot(this.last[0] - this.start[0], this.last[1] - this.start[1]);
            this.direction = [cos, sin];
            frames.push(new Float32Array([cos, sin, c * sin - s * cos, c * cos + s * sin, away]));
        }
    }
}

/// All frames of a stroke, one after the other: what `Examples.add` and `Model.predict` take.
export function framesOf(points) {
    const tracer = new Tracer();
    return Float32Array.from(points.flatMap((point) => tracer.add(point).flatMap((frame) => [...frame])));
}

/// Random numbers from 0 to 1, the same ones from the same seed: mulberry32.
export function generator(seed) {
    return () => {
        seed = (seed + 0x6d2b79f5) | 0;
        let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
        t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
        return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    };
}

/// A stroke as another day's hand would draw it: turned a little, stretched, larger or smaller.
export function varied(points, random) {
    const between = (low, high) => low + (high - low) * random();
    const [angle, size, stretch] = [between(-0.25, 0.25), between(0.7, 1.3), between(0.87, 1.15)];
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    const [x0, y0] = points[0];
    return points.map(([x, y]) => {
        const [dx, dy] = [(x - x0) * size * stretch, ((y - y0) * size) / stretch];
        return [x0 + cos * dx - sin * dy + between(-0.004, 0.004), y0 + sin * dx + cos * dy + between(-0.004, 0.004)];
    });
}

/// x, y, x, y, … in thousandths → points.
export function pointsOf(numbers) {
    return Array.from({ length: numbers.length / 2 }, (_, i) => [numbers[2 * i] / 1000, numbers[2 * i + 1] / 1000]);
}

/// Points of any unit, brought into the square.
export function fitted(points) {
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
    const [left, top] = [Math.min(...xs), Math.min(...ys)];
    const size = Math.max(Math.max(...xs) - left, Math.max(...ys) - top) || 1;
    const inside = left >= 0 && top >= 0 && left + size <= 1 && top + size <= 1;
    return inside ? points : points.map(([x, y]) => [0.2 + (0.6 * (x - left)) / size, 0.2 + (0.6 * (y - top)) / size]);
}

/// The rows of numbers of a text: lines separated by commas, semicolons, tabs or spaces; a line of names is passed over.
export function table(text) {
    const rows = text.split(/\r?\n/).map((line) => line.trim().split(/[,;\s]+/).map(Number));
    return rows.filter((row) => row.length > 1 && row.every(Number.isFinite));
}
