// The page: sends the visitor's actions to the server, stores the server's messages as history and draws it.
import * as charts from "./charts.js";

const $ = (id) => document.getElementById(id);
const HISTORY = { windows: 6, steps: 200, points: 1500, events: 50 };
let info = null, socket = null, playing = false, person = null, dirty = true, rotation = null;
let history = null;

function clear() {
  history = { windows: [], steps: [], points: [], marks: [], positions: {}, numWindows: 0 };
  $("events").innerHTML = '<li class="none">Nothing yet.</li>';
  $("progress").value = 0;
  $("rotation").textContent = "–";
  $("true-class").textContent = "–";
  document.querySelectorAll("#rules tbody td:not(.description)").forEach((cell) => { cell.textContent = "–"; cell.className = cell.className.includes("n") ? "n" : ""; });
  dirty = true;
}

const send = (action, options = {}) => socket?.readyState === WebSocket.OPEN && socket.send(JSON.stringify({ action, ...options }));

function setStatus(text, error = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", error);
}

function logEvent(text, kind) {
  $("events").querySelector(".none")?.remove();
  const item = document.createElement("li");
  item.textContent = `Window ${history.numWindows}: ${text}`;
  $("events").prepend(item);
  while ($("events").children.length > HISTORY.events) $("events").lastChild.remove();
  history.marks.push({ window: history.numWindows, kind });
  setStatus(`Window ${history.numWindows}: ${text}`);
  dirty = true;
}

function setPlaying(value) {
  playing = value;
  $("play").textContent = value ? "Pause" : "Play";
}

const speed = () => 10 ** Number($("speed").value);

function showSpeed() {
  const text = `${Math.round(speed())}×`;
  $("speed-now").textContent = text;
  $("speed").setAttribute("aria-valuetext", `${Math.round(speed())} times real time`);
}

function build() {
  $("title").textContent = `Data: ${info.title}.`;
  $("person").replaceChildren(...Object.entries(info.people).map(([name, n]) => new Option(`${name} (${Math.round((n * info.hop) / 60)} min)`, name)));
  $("order").replaceChildren(...Object.entries(info.orders).map(([name, label]) => new Option(label, name)));
  $("criterion").textContent = info.criterion;
  $("reason").textContent = info.reason;
  $("presets").replaceChildren(...Object.entries(info.presets).map(([name, { title }]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.dataset.preset = name;
    button.onclick = () => { setPlaying(false); send("preset", { name }); };
    return button;
  }));
  $("rules").querySelector("tbody").replaceChildren(...Object.entries(info.rules).map(([name, description], i) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.append(charts.key(i), name);
    row.append(head, ...["", "n", "n", "description"].map((kind) => {
      const cell = document.createElement("td");
      cell.className = kind;
      cell.textContent = kind === "description" ? description : "–";
      return cell;
    }));
    row.dataset.rule = name;
    return row;
  }));
  $("classes").replaceChildren(...info.classes.map((name, i) => {
    const item = document.createElement("span"), swatch = document.createElement("span");
    item.className = "class";
    swatch.className = "swatch";
    swatch.style.background = charts.CLASSES[i % charts.CLASSES.length];
    item.append(swatch, name);
    return item;
  }), "Red underline: wrong.");
  ["play", "calibrate", "switch", "restart"].forEach((id) => { $(id).disabled = false; });
  $("switch").disabled = Object.keys(info.people).length < 2;
}

const percent = (v) => `${(100 * v).toFixed(0)} %`;

function windows(message) {
  for (const step of message.steps) {
    history.numWindows += 1;
    history.windows.push(step.signal);
    history.steps.push(step);
    history.points.push({ window: history.numWindows, recent: step.recent, angle: step.angle });
    if (step.event) logEvent(step.event, "action");
    if (step.alarm) logEvent("drift detected: the signal has changed", "drift");
  }
  history.windows = history.windows.slice(-HISTORY.windows);
  history.steps = history.steps.slice(-HISTORY.steps);
  history.numWindows = message.num_windows;
  history.points = history.points.slice(-HISTORY.points);
  showRotation(message.rotation);
  if (message.person !== person) { person = message.person; $("person").value = person; }
  if (message.steps.some((step) => step.event)) showSlider(message.degrees, message.rotation.true_axis);
  $("progress").value = message.position / message.total;
  const last = message.steps[message.steps.length - 1];
  if (last) {
    $("true-class").textContent = info.classes[last.label];
    for (const row of $("rules").querySelectorAll("tbody tr")) {
      const [, current, recent, all] = row.children, name = row.dataset.rule;
      current.textContent = info.classes[last.predicted[name]];
      current.className = last.predicted[name] === last.label ? "right" : "wrong";
      recent.textContent = percent(message.accuracy[name].recent);
      all.textContent = percent(message.accuracy[name].all);
    }
  }
  dirty = true;
}

function showRotation(r) {
  const axis = (v) => `(${v.map((c) => c.toFixed(1)).join(", ")})`;
  $("rotation").textContent = `True: ${r.true}°${r.true ? ` about ${axis(r.true_axis)}` : ""}. Estimated: ${Math.round(r.degrees)}°`
    + `${r.degrees >= 1 ? ` about ${axis(r.axis)}` : ""}. Angle between them: ${Math.round(r.error)}°. Certainty: ${percent(r.certainty)}.`;
}

function showSlider(degrees, axis) {
  $("rotate").value = degrees;
  $("rotate-now").textContent = `${degrees}°`;
  const found = [...$("axis").options].find((o) => {
    const v = o.value.split(",").map(Number), n = Math.hypot(...v);
    return v.every((c, i) => Math.abs(c / n - axis[i]) < 0.02);
  });
  if (found) $("axis").value = found.value;
}

function recorded(message) {
  const button = $("record-list").querySelector(`[data-class="${message.recorded}"]`);
  if (button) {
    button.disabled = true;
    button.textContent = `✓ ${info.classes[message.recorded]}`;
  }
  if (message.done) {
    $("recorded").textContent = "Calibrated.";
    logEvent("calibrated with one window of each activity", "action");
    $("record-all").disabled = true;
    $("close").focus();
  } else {
    $("recorded").textContent = `${message.missing.length} remaining.`;
    if ($("dialog").open && document.activeElement === document.body) $("record-list").querySelector("button:not(:disabled)")?.focus();
  }
}

const HANDLERS = {
  hello(message) {
    info = message;
    build();
    open(Object.keys(info.people)[0]);
  },
  opened(message) {
    clear();
    person = message.person;
    $("person").value = person;
    $("order").value = message.order;
    showSlider(0, [0, 0, 1]);
    const preset = info.presets[message.preset];
    $("story").textContent = preset?.about ?? "";
    document.querySelectorAll("#presets button").forEach((b) => b.setAttribute("aria-pressed", b.dataset.preset === message.preset));
    if (preset) {
      $("speed").value = 1.5;
      showSpeed();
      setPlaying(true);
      send("play", { speed: speed() });
      setStatus(`${preset.title}: playing ${person}.`);
    } else if (!playing) setStatus(`${person} is ready. Press Play.`);
  },
  windows,
  switched(message) {
    person = message.person;
    $("person").value = person;
    logEvent(`${person} now has the device; the rules are not informed`, "action");
  },
  rotated(message) { logEvent(`the sensor is rotated by ${message.degrees}°`, "action"); },
  recorded,
  ended() {
    setPlaying(false);
    setStatus("The recording has ended. Play repeats it with the current statistics.");
  },
  error(message) { setStatus(message.text, true); },
};

// Stops immediately: Play may be pressed before the reply arrives.
function open(name) {
  person = name;
  setPlaying(false);
  send("open", { person: name, order: $("order").value || "recorded" });
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/play`);
  socket.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.layers && Array.isArray(Object.values(message.layers)[0])) {
      history.positions = message.layers;
      dirty = true;
    }
    HANDLERS[message.kind]?.(message);
  };
  socket.onclose = (event) => {
    setPlaying(false);
    ["play", "calibrate", "switch", "restart"].forEach((id) => { $(id).disabled = true; });
    setStatus(`${event.reason || "The service has stopped"}. Reload this page when it is running again.`, true);
  };
}

$("play").onclick = () => {
  setPlaying(!playing);
  setStatus(playing ? `Playing ${person}.` : "Paused.");
  send(playing ? "play" : "pause", { speed: speed() });
};
$("restart").onclick = () => open(person);
$("person").onchange = $("order").onchange = () => open($("person").value);
$("switch").onclick = () => {
  const names = Object.keys(info.people);
  send("switch", { person: names[(names.indexOf(person) + 1) % names.length] });
};
$("speed").oninput = () => {
  showSpeed();
  if (playing) send("play", { speed: speed() });
};
$("rotate").oninput = $("axis").onchange = () => {
  const degrees = Number($("rotate").value);
  $("rotate-now").textContent = `${degrees}°`;
  $("rotate").setAttribute("aria-valuetext", `${degrees} degrees`);
  clearTimeout(rotation);
  const axis = $("axis").value.split(",").map(Number);
  rotation = setTimeout(() => send("rotate", { degrees, axis }), 250);
};
$("calibrate").onclick = () => {
  $("record-list").replaceChildren(...info.classes.map((name, i) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.dataset.class = i;
    button.textContent = `Record ${name}`;
    button.onclick = () => send("record", { class: i });
    item.append(button);
    return item;
  }));
  $("recorded").textContent = "";
  $("record-all").disabled = false;
  $("dialog").showModal();
};
$("record-all").onclick = () => $("record-list").querySelectorAll("button:not(:disabled)").forEach((b) => b.click());
$("close").onclick = () => $("dialog").close();
$("controls").onsubmit = (event) => event.preventDefault();

function draw() {
  if (dirty && info) {
    dirty = false;
    const rules = Object.keys(info.rules);
    charts.signals($("signals"), history.windows);
    charts.accuracy($("accuracy"), rules, history.points, history.marks);
    charts.angles($("angles"), history.points, history.marks);
    charts.activity($("activity"), rules, history.steps);
    charts.layers($("layers"), info.layers, rules, history.positions);
  }
  requestAnimationFrame(draw);
}

const redraw = () => { dirty = true; };
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
clear();
showSpeed();
connect();
requestAnimationFrame(draw);
