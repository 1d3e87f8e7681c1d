// The page: what the visitor does goes to the server, what the server says is kept as history and drawn.
import * as charts from "./charts.js";

const $ = (id) => document.getElementById(id);
const KEPT = { windows: 6, steps: 200, points: 1500, events: 50 };
let about = null, socket = null, playing = false, person = null, dirty = true, rotation = null;
let history = null;

function clear() {
  history = { windows: [], steps: [], points: [], marks: [], positions: {}, met: 0 };
  $("events").innerHTML = '<li class="none">Nothing yet.</li>';
  $("progress").value = 0;
  $("truth").textContent = "–";
  document.querySelectorAll("#rules tbody td:not(.what)").forEach((cell) => { cell.textContent = "–"; cell.className = cell.className.includes("n") ? "n" : ""; });
  dirty = true;
}

const send = (what, more = {}) => socket?.readyState === WebSocket.OPEN && socket.send(JSON.stringify({ do: what, ...more }));

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function happened(text, kind) {
  $("events").querySelector(".none")?.remove();
  const item = document.createElement("li");
  item.textContent = `Window ${history.met}: ${text}`;
  $("events").prepend(item);
  while ($("events").children.length > KEPT.events) $("events").lastChild.remove();
  history.marks.push({ met: history.met, kind });
  say(`Window ${history.met}: ${text}`);
  dirty = true;
}

function setPlaying(now) {
  playing = now;
  $("play").textContent = now ? "Pause" : "Play";
}

const speed = () => 10 ** Number($("speed").value);

function showSpeed() {
  const text = `${Math.round(speed())}×`;
  $("speed-now").textContent = text;
  $("speed").setAttribute("aria-valuetext", `${Math.round(speed())} times real time`);
}

function build() {
  $("title").textContent = `Data: ${about.title}.`;
  $("person").replaceChildren(...Object.entries(about.people).map(([name, n]) => new Option(`${name} (${Math.round((n * about.hop) / 60)} min)`, name)));
  $("rules").querySelector("tbody").replaceChildren(...Object.entries(about.rules).map(([name, what], i) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.append(charts.key(i), name);
    row.append(head, ...["", "n", "n", "what"].map((kind) => {
      const cell = document.createElement("td");
      cell.className = kind;
      cell.textContent = kind === "what" ? what : "–";
      return cell;
    }));
    row.dataset.rule = name;
    return row;
  }));
  $("classes").replaceChildren(...about.classes.map((name, i) => {
    const item = document.createElement("span"), swatch = document.createElement("span");
    item.className = "class";
    swatch.className = "swatch";
    swatch.style.background = charts.CLASSES[i % charts.CLASSES.length];
    item.append(swatch, name);
    return item;
  }), "Red underneath: wrong.");
  ["play", "calibrate", "switch", "restart"].forEach((id) => { $(id).disabled = false; });
  $("switch").disabled = Object.keys(about.people).length < 2;
}

const percent = (v) => `${(100 * v).toFixed(0)} %`;

function windows(message) {
  for (const step of message.steps) {
    history.met += 1;
    history.windows.push(step.signal);
    history.steps.push(step);
    if (step.alarm) happened("drift noticed: the signal is not what it was", "drift");
  }
  history.windows = history.windows.slice(-KEPT.windows);
  history.steps = history.steps.slice(-KEPT.steps);
  history.met = message.met;
  const recent = Object.fromEntries(Object.entries(message.accuracy).map(([name, a]) => [name, a.recent]));
  history.points = [...history.points, { met: message.met, recent }].slice(-KEPT.points);
  $("progress").value = message.at / message.of;
  const last = message.steps[message.steps.length - 1];
  if (last) {
    $("truth").textContent = about.classes[last.truth];
    for (const row of $("rules").querySelectorAll("tbody tr")) {
      const [, now, fifty, all] = row.children, name = row.dataset.rule;
      now.textContent = about.classes[last.said[name]];
      now.className = last.said[name] === last.truth ? "right" : "wrong";
      fifty.textContent = percent(message.accuracy[name].recent);
      all.textContent = percent(message.accuracy[name].all);
    }
  }
  dirty = true;
}

function recorded(message) {
  const button = $("wanted").querySelector(`[data-class="${message.recorded}"]`);
  if (button) {
    button.disabled = true;
    button.textContent = `✓ ${about.classes[message.recorded]}`;
  }
  if (message.done) {
    $("recorded").textContent = "Calibrated.";
    happened("calibrated with one window of each activity", "told");
    $("record-all").disabled = true;
    $("close").focus();
  } else {
    $("recorded").textContent = `${message.missing.length} to go.`;
    if ($("dialog").open && document.activeElement === document.body) $("wanted").querySelector("button:not(:disabled)")?.focus();
  }
}

const ON = {
  hello(message) {
    about = message;
    build();
    open(Object.keys(about.people)[0]);
  },
  opened(message) {
    clear();
    person = message.person;
    $("person").value = person;
    $("rotate").value = 0;
    $("rotate-now").textContent = "0°";
    if (!playing) say(`${person} is ready. Press Play.`);
  },
  windows,
  switched(message) {
    person = message.person;
    $("person").value = person;
    happened(`${person} has the device now; no rule was told`, "told");
  },
  rotated(message) { happened(`the sensor is turned by ${message.degrees}°`, "told"); },
  recorded,
  ended() {
    setPlaying(false);
    say("The recording is over. Play repeats it, with the statistics as they are now.");
  },
  error(message) { say(message.text, true); },
};

// Stops here and not when the answer comes: Play may be pressed in between.
function open(name) {
  person = name;
  setPlaying(false);
  send("open", { person: name });
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/play`);
  socket.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.layers && Array.isArray(Object.values(message.layers)[0])) {
      history.positions = message.layers;
      dirty = true;
    }
    ON[message.kind]?.(message);
  };
  socket.onclose = (event) => {
    setPlaying(false);
    ["play", "calibrate", "switch", "restart"].forEach((id) => { $(id).disabled = true; });
    say(`${event.reason || "The service has ended"}. Reload this page when it is there again.`, true);
  };
}

$("play").onclick = () => {
  setPlaying(!playing);
  say(playing ? `Playing ${person}.` : "Paused.");
  send(playing ? "play" : "pause", { speed: speed() });
};
$("restart").onclick = () => open(person);
$("person").onchange = () => open($("person").value);
$("switch").onclick = () => {
  const names = Object.keys(about.people);
  send("switch", { person: names[(names.indexOf(person) + 1) % names.length] });
};
$("speed").oninput = () => {
  showSpeed();
  if (playing) send("play", { speed: speed() });
};
$("rotate").oninput = () => {
  const degrees = Number($("rotate").value);
  $("rotate-now").textContent = `${degrees}°`;
  $("rotate").setAttribute("aria-valuetext", `${degrees} degrees`);
  clearTimeout(rotation);
  rotation = setTimeout(() => send("rotate", { degrees }), 250);
};
$("calibrate").onclick = () => {
  $("wanted").replaceChildren(...about.classes.map((name, i) => {
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
$("record-all").onclick = () => $("wanted").querySelectorAll("button:not(:disabled)").forEach((b) => b.click());
$("close").onclick = () => $("dialog").close();
$("controls").onsubmit = (event) => event.preventDefault();

function draw() {
  if (dirty && about) {
    dirty = false;
    const rules = Object.keys(about.rules);
    charts.signals($("signals"), history.windows);
    charts.accuracy($("accuracy"), rules, history.points, history.marks);
    charts.activity($("activity"), rules, history.steps);
    charts.layers($("layers"), about.layers, rules, history.positions);
  }
  requestAnimationFrame(draw);
}

const again = () => { dirty = true; };
addEventListener("resize", again);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
clear();
showSpeed();
connect();
requestAnimationFrame(draw);
