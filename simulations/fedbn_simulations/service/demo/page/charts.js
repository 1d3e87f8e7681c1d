// Charts: redrawn from the history whenever it changes, in the colors of the style sheet.

export const DASHES = [[6, 4], [2, 3], [], [10, 3, 2, 3], [1, 5]];
export const CLASSES = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB"];

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1, { clientWidth: w, clientHeight: h } = canvas;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, w, h);
  g.font = "12px system-ui, sans-serif";
  g.lineWidth = 1;
  g.setLineDash([]);
  return { g, w, h };
}

export function signals(canvas, windows) {
  const { g, w, h } = prepare(canvas);
  const channels = windows.length ? windows[0].length : 6, kinds = channels / 3;
  const names = ["acceleration (g)", "rotation (rad/s)"], left = 34;
  for (let kind = 0; kind < kinds; kind++) {
    const top = (kind * h) / kinds + 18, height = h / kinds - 24;
    const series = [0, 1, 2].map((axis) => windows.flatMap((x) => x[3 * kind + axis]));
    const all = series.flat();
    const low = Math.min(-1, ...all), high = Math.max(1, ...all), y = (v) => top + height * (1 - (v - low) / (high - low));
    g.fillStyle = color("--soft");
    g.fillText(names[kind] || `sensor ${kind + 1}`, left, top - 6);
    g.textAlign = "right";
    for (const v of [low, high]) g.fillText(v.toFixed(1), left - 5, y(v) + (v === low ? 0 : 8));
    g.textAlign = "left";
    g.strokeStyle = color("--edge");
    g.beginPath(); g.moveTo(left, y(0)); g.lineTo(w, y(0)); g.stroke();
    series.forEach((values, axis) => {
      g.strokeStyle = color(`--a${axis}`);
      g.lineWidth = 1.5;
      g.beginPath();
      values.forEach((v, i) => g.lineTo(left + ((w - left) * i) / Math.max(1, values.length - 1), y(v)));
      g.stroke();
      g.lineWidth = 1;
    });
  }
}

export function accuracy(canvas, rules, points, marks) {
  const { g, w, h } = prepare(canvas);
  const left = 46, bottom = h - 20, top = 8;
  const last = points.length ? points[points.length - 1].window : 1, first = points.length ? points[0].window : 0;
  const x = (n) => left + ((w - left - 4) * (n - first)) / Math.max(1, last - first), y = (v) => bottom - v * (bottom - top);
  g.fillStyle = color("--soft");
  g.strokeStyle = color("--edge");
  for (const v of [0, 0.25, 0.5, 0.75, 1]) {
    g.beginPath(); g.moveTo(left, y(v)); g.lineTo(w, y(v)); g.stroke();
    g.textAlign = "right";
    g.fillText(`${100 * v} %`, left - 5, y(v) + 4);
  }
  g.fillText(`window ${last}`, w - 2, h - 4);
  g.textAlign = "left";
  g.fillText(`${first}`, left, h - 4);
  for (const mark of marks) {
    if (mark.window < first) continue;
    g.strokeStyle = color(mark.kind === "drift" ? "--drift" : "--action");
    g.lineWidth = 2;
    g.beginPath(); g.moveTo(x(mark.window), top); g.lineTo(x(mark.window), bottom); g.stroke();
  }
  // Solid lines first, so that they stay visible below dashed ones if rules agree.
  const order = rules.map((name, i) => [name, i]).sort((a, b) => DASHES[a[1]].length - DASHES[b[1]].length);
  order.forEach(([name, i]) => {
    g.strokeStyle = color(`--r${i}`);
    g.lineWidth = DASHES[i].length ? 2.2 : 3.4;
    g.setLineDash(DASHES[i]);
    g.beginPath();
    for (const point of points) g.lineTo(x(point.window), y(point.recent[name]));
    g.stroke();
  });
}

export function angles(canvas, points, marks) {
  const { g, w, h } = prepare(canvas);
  const left = 46, bottom = h - 20, top = 8;
  const last = points.length ? points[points.length - 1].window : 1, first = points.length ? points[0].window : 0;
  const x = (n) => left + ((w - left - 4) * (n - first)) / Math.max(1, last - first), y = (v) => bottom - (v / 180) * (bottom - top);
  g.fillStyle = color("--soft");
  g.strokeStyle = color("--edge");
  for (const v of [0, 45, 90, 135, 180]) {
    g.beginPath(); g.moveTo(left, y(v)); g.lineTo(w, y(v)); g.stroke();
    g.textAlign = "right";
    g.fillText(`${v}°`, left - 5, y(v) + 4);
  }
  g.fillText(`window ${last}`, w - 2, h - 4);
  g.textAlign = "left";
  g.fillText(`${first}`, left, h - 4);
  g.lineWidth = 2;
  for (const mark of marks) {
    if (mark.window < first || mark.kind === "drift") continue;
    g.strokeStyle = color("--action");
    g.beginPath(); g.moveTo(x(mark.window), top); g.lineTo(x(mark.window), bottom); g.stroke();
  }
  g.strokeStyle = color("--r2");
  g.lineWidth = 3;
  g.beginPath();
  for (const point of points) g.lineTo(x(point.window), y(point.angle));
  g.stroke();
}

export function activity(canvas, rules, steps) {
  const { g, w, h } = prepare(canvas);
  const rows = ["true", ...rules], left = 76, numShown = 90, height = Math.min(34, h / rows.length), width = (w - left) / numShown;
  const recent = steps.slice(-numShown);
  rows.forEach((name, r) => {
    const top = r * height + (r ? 8 : 2);
    g.fillStyle = color("--ink");
    g.fillText(name, 0, top + height / 2 + 2);
    recent.forEach((step, i) => {
      const label = r ? step.predicted[name] : step.label, wrong = r && label !== step.label;
      g.fillStyle = CLASSES[label % CLASSES.length];
      g.fillRect(left + i * width, top, Math.ceil(width), height - 12);
      if (wrong) {
        g.fillStyle = color("--a0");
        g.fillRect(left + i * width, top + height - 11, Math.ceil(width), 3);
      }
    });
  });
}

const NS = "http://www.w3.org/2000/svg";

function addElement(name, attributes, parent, text) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

export function marker(i, x, y, parent) {
  const fill = `var(--r${i})`, style = `fill: ${fill}; stroke: var(--card); stroke-width: 1.5`;
  const shapes = [`M${x - 6},${y} a6,6 0 1,0 12,0 a6,6 0 1,0 -12,0`, `M${x - 6},${y - 6} h12 v12 h-12 z`,
    `M${x},${y - 8} l8,14 h-16 z`, `M${x},${y - 8} l8,8 l-8,8 l-8,-8 z`, `M${x},${y + 8} l8,-14 h-16 z`];
  addElement("path", { d: shapes[i] }, parent).style.cssText = style;
}

export function key(i) {
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("class", "key");
  svg.setAttribute("viewBox", "0 0 34 12");
  svg.setAttribute("aria-hidden", "true");
  const line = addElement("line", { x1: 0, y1: 6, x2: 34, y2: 6, "stroke-width": 2.5 }, svg);
  line.style.stroke = `var(--r${i})`;
  line.setAttribute("stroke-dasharray", DASHES[i].join(" ") || "none");
  return svg;
}

export function layers(box, names, rules, positions) {
  const width = Math.max(260, box.clientWidth), rowHeight = 26 + 17 * rules.length, left = 96, right = width - 16;
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${names.length * rowHeight + 4}`);
  names.forEach((name, l) => {
    const top = l * rowHeight;
    addElement("text", { x: 0, y: top + 14, "font-weight": 600 }, svg, name);
    addElement("text", { x: left, y: top + 14, class: "soft" }, svg, "population");
    addElement("text", { x: right, y: top + 14, class: "soft", "text-anchor": "end" }, svg, "this person");
    rules.forEach((rule, r) => {
      const y = top + 28 + 17 * r;
      addElement("text", { x: left - 12, y: y + 4, class: "soft", "text-anchor": "end" }, svg, rule);
      addElement("line", { x1: left, y1: y, x2: right, y2: y, class: "track" }, svg);
      marker(r, left + (right - left) * (positions[rule]?.[l] ?? 0), y, svg);
    });
  });
  box.replaceChildren(svg);
  const shares = rules.map((rule) => `${rule} ${(positions[rule] ?? []).map((p) => Math.round(100 * p) + " %").join(", ")}`);
  box.setAttribute("aria-label", `Position between the population (0 %) and this person (100 %), per layer: ${shares.join("; ")}`);
}
