// Drawings on canvases, sharp on every screen and in the page's colours.

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const classColour = (i) => `hsl(${(212 + i * 137.5) % 360} 70% ${matchMedia("(prefers-color-scheme: dark)").matches ? 66 : 46}%)`;

/// The canvas's context, cleared, with its size in CSS pixels.
export function begin(canvas) {
    const { width, height } = canvas.getBoundingClientRect();
    const scale = devicePixelRatio || 1;
    const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.lineCap = context.lineJoin = "round";
    return { context, width, height };
}

function trace(context, points) {
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.stroke();
}

/// Strokes in a square canvas: a faint one to follow, and the one being drawn.
export function drawStroke(canvas, points) {
    const { context, width } = begin(canvas);
    if (!points.length) return;
    context.strokeStyle = colour("--accent");
    context.lineWidth = 5;
    trace(context, points.map(([x, y]) => [x * width, y * width]));
    const [x, y] = points[points.length - 1];
    context.fillStyle = colour("--accent");
    context.beginPath();
    context.arc(x * width, y * width, 7, 0, 2 * Math.PI);
    context.fill();
}

/// The loss of each step, its smooth course above it, and how far all steps would reach.
export function drawLoss(canvas, losses, steps) {
    losses = [...losses];
    const { context, width, height } = begin(canvas);
    const [left, top, right, bottom] = [34, 8, width - 8, height - 20];
    const most = Math.max(1, ...losses) * 1.05;
    const at = (i, loss) => [left + ((right - left) * i) / Math.max(1, steps - 1), bottom - ((bottom - top) * loss) / most];
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = colour("--muted");
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let i = 0; i <= 2; i++) {
        const y = bottom - ((bottom - top) * i) / 2;
        trace(context, [[left, y], [right, y]]);
        context.fillText(((most * i) / 2).toFixed(1), left - 7, y);
    }
    context.textBaseline = "top";
    context.fillText(`step ${steps}`, right, bottom + 6);
    context.textAlign = "left";
    context.fillText("loss", left, bottom + 6);
    if (!losses.length) return;
    context.globalAlpha = 0.3;
    context.strokeStyle = colour("--accent");
    trace(context, losses.map((loss, i) => at(i, loss)));
    context.globalAlpha = 1;
    context.lineWidth = 2.5;
    let mean = losses[0];
    trace(context, losses.map((loss, i) => at(i, (mean += (loss - mean) * Math.min(1, Math.max(0.1, 1 / (i + 1)))))));
}

/// The probabilities after each frame, a line for each class, and the mean gate, dashed.
export function drawTimeline(canvas, history) {
    const { context, width, height } = begin(canvas);
    const [top, bottom] = [6, height - 6];
    const count = Math.max(40, history.length);
    const at = (i, p) => [2 + ((width - 4) * i) / (count - 1), bottom - (bottom - top) * p];
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    for (const p of [0, 0.5, 1]) trace(context, [at(0, p), at(count - 1, p)]);
    if (!history.length) return;
    context.lineWidth = 2.5;
    history[0].probabilities.forEach((_, c) => {
        context.strokeStyle = classColour(c);
        trace(context, history.map(({ probabilities }, i) => at(i, probabilities[c])));
    });
    context.strokeStyle = colour("--muted");
    context.lineWidth = 1.5;
    context.setLineDash([2, 4]);
    trace(context, history.map(({ gates }, i) => at(i, gates.reduce((sum, gate) => sum + gate, 0) / gates.length)));
    context.setLineDash([]);
}

/// A stroke as a small picture.
export function thumbnail(points) {
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
    const [left, top] = [Math.min(...xs), Math.min(...ys)];
    const size = Math.max(Math.max(...xs) - left, Math.max(...ys) - top, 0.01);
    const [shiftX, shiftY] = [Math.max(...xs) - left, Math.max(...ys) - top].map((extent) => (size - extent) / 2);
    const d = points.map(([x, y], i) => `${i ? "L" : "M"}${(3 + (26 * (x - left + shiftX)) / size).toFixed(1)} ${(3 + (26 * (y - top + shiftY)) / size).toFixed(1)}`);
    return `<svg viewBox="0 0 32 32" aria-hidden="true"><path d="${d.join("")}"/></svg>`;
}
