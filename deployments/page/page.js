"use strict";
// What applications have, shown: asks /v1/chat/completions with `explain` and /status; nothing from elsewhere.

const COLOURS = ["#2f6fd0", "#d9822b", "#2e9e6b", "#a24fbf", "#c8473f", "#16929c", "#8a8f2a", "#c2528b"];
const NOBODY = "#8b929c"; // what a grammar forces
const MOST_TREES = 200;
const LOOK_MS = 2000;
const $ = (id) => document.getElementById(id);
let messages = [];
let running = []; // abort controllers of what is being answered
let model = "";
const known = []; // drafters, in the order of their colours

function colour(name) {
  if (name === undefined) return NOBODY;
  if (!known.includes(name)) known.push(name);
  return COLOURS[known.indexOf(name) % COLOURS.length];
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(who, text) {
  const message = element("p", undefined, "message");
  message.append(element("b", who), element("span", text));
  $("messages").append(message);
  message.scrollIntoView({ block: "nearest" });
  return message.lastChild;
}

async function* chunksOf(body, signal) {
  const answer = await fetch("v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  if (!answer.ok) {
    const failed = await answer.json().catch(() => ({}));
    throw new Error(failed.error?.message ?? `the server answered ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function request(strategy) {
  const temperature = Number($("temperature").value);
  return {
    model, messages, temperature, max_tokens: Number($("tokens").value), seed: 7, stream: true,
    stream_options: { include_usage: true }, taps: { strategy, explain: true },
  };
}

async function ask(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running.length) return;
  messages.push({ role: "user", content: text });
  say("you", text);
  $("text").value = "";
  $("trees").replaceChildren();
  for (const id of ["per-pass", "speed", "plain"]) $(id).textContent = "–";
  $("shares").replaceChildren();
  const into = say(`${model}, ${$("strategy").value}`, "");
  const answers = [answer(request($("strategy").value), into, $("speed"), true)];
  if ($("compare").checked) answers.push(answer(request("off"), null, $("plain"), false));
  busy(true);
  const [said] = await Promise.all(answers);
  running = [];
  busy(false);
  if (said) messages.push({ role: "assistant", content: said });
  else messages.pop();
  $("text").focus();
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
}

async function answer(body, into, speed, isShown) {
  const control = new AbortController();
  running.push(control);
  let said = "", tokens = 0, passes = 0, began = 0;
  try {
    for await (const chunk of chunksOf(body, control.signal)) {
      const delta = chunk.choices[0]?.delta?.content;
      if (delta) {
        began ||= performance.now();
        said += delta;
        if (into) into.textContent = said;
      }
      if (chunk.taps) {
        tokens += chunk.taps.tokens;
        passes += chunk.taps.passes;
        const seconds = (performance.now() - began) / 1000;
        if (seconds > 0.05) speed.textContent = (tokens / seconds).toFixed(1);
        if (isShown) {
          $("per-pass").textContent = (tokens / passes).toFixed(2);
          show(chunk.taps, passes);
        }
      }
      if (chunk.metrics && isShown) shares(chunk.metrics.speculative_decoding);
    }
  } catch (error) {
    if (error.name !== "AbortError" && into) {
      into.textContent = said ? `${said}\n${error.message}` : error.message;
      into.classList.add("bad");
    }
    return error.name === "AbortError" ? said : "";
  }
  return said;
}

function show(step, number) {
  const row = element("li");
  const asked = step.asked ?? [];
  const facts = [`pass ${number}`, `${step.tokens} token${step.tokens === 1 ? "" : "s"}`];
  if (step.passes > 1) facts.push(`${step.passes} passes`);
  if (step.batch > 1) facts.push(`${step.batch} sessions`);
  if (asked.length) facts.push(`asked ${asked.join(", ")}`);
  facts.push(`${(step.draft_ms + step.verify_ms).toFixed(0)} ms`);
  row.append(element("p", facts.join(" · ")), drawn(step));
  $("trees").prepend(row);
  while ($("trees").children.length > MOST_TREES) $("trees").lastChild.remove();
}

// The drafted tree from left to right, what the target decided below it.
function drawn(step) {
  const nodes = (step.tree ?? []).map((node) => ({ ...node, children: [] }));
  const roots = [];
  nodes.forEach((node) => (node.parent < 0 ? roots : nodes[node.parent].children).push(node));
  const shown = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣");
  let row = 0;
  const place = (node, x) => {
    node.x = x;
    node.width = 14 + 7.4 * shown(node.text).length;
    node.children.sort((a, b) => b.accepted - a.accepted);
    if (!node.children.length) node.y = row++;
    else node.children.forEach((child) => place(child, x + node.width + 16));
    if (node.children.length) node.y = node.children[0].y;
  };
  roots.sort((a, b) => b.accepted - a.accepted).forEach((root) => place(root, 14));
  const decided = step.text.map(shown).join("");
  const width = Math.max(60, 7.4 * decided.length + 30, ...nodes.map((node) => node.x + node.width + 6));
  const height = 20 * (row + 1) + 4;
  const said = nodes.map((node) => `${shown(node.text)} by ${node.drafters.join(" and ") || "the form"}${node.accepted ? ", accepted" : ""}`);
  const picture = svg("svg", { width, height, role: "img", "aria-label": `decided ${decided}; drafted: ${said.join("; ") || "nothing"}` });
  const middle = (node) => 20 * node.y + 11;
  nodes.forEach((node) => {
    const parent = node.parent < 0 ? { x: 0, width: 4, y: node.y } : nodes[node.parent];
    const from = parent.x + parent.width;
    picture.append(svg("path", { class: "link", d: `M${from} ${middle(parent)} C${from + 8} ${middle(parent)} ${node.x - 8} ${middle(node)} ${node.x} ${middle(node)}` }));
  });
  nodes.forEach((node) => {
    const group = svg("g", node.accepted ? {} : { class: "left-out" });
    const [first, second] = node.drafters;
    group.append(svg("rect", {
      x: node.x, y: middle(node) - 8, width: node.width, height: 16, rx: 4, stroke: colour(first),
      fill: colour(first), "fill-opacity": node.accepted ? 0.35 : 0.0,
    }));
    if (second !== undefined) {
      group.append(svg("rect", { x: node.x, y: middle(node) + 6, width: node.width, height: 3, fill: colour(second) }));
    }
    group.append(svg("title", {}, said[nodes.indexOf(node)]), svg("text", { x: node.x + 7, y: middle(node) + 4 }, shown(node.text)));
    picture.append(group);
  });
  picture.append(svg("text", { x: 14, y: height - 7 }, `→ ${decided}`));
  return picture;
}

function shares(counts) {
  const found = Object.entries(counts.accepted_by_drafter);
  const most = Math.max(1, ...found.map(([, count]) => count));
  $("shares").replaceChildren(...found.map(([name, count]) => {
    const row = element("div", undefined, "share");
    const bar = element("i");
    bar.style.width = `${(100 * count) / most}%`;
    bar.style.background = colour(name);
    row.append(element("span", name), bar, element("span", String(count)));
    return row;
  }));
}

function rowOf(...cells) {
  const row = element("tr");
  row.append(...cells.map((cell) => {
    const made = element("td");
    made.append(cell);
    return made;
  }));
  return row;
}

async function look() {
  try {
    const answer = await fetch("status");
    const told = await answer.json();
    model = told.model;
    const router = told.router;
    $("about").textContent = `${told.model} · ${told.status} · ${told.numerics}`;
    $("about").classList.toggle("bad", told.status !== "ok");
    $("load").textContent = `${router.answering} being answered · ${router.tokens_per_second.toFixed(1)} tokens/s · ${router.tokens} tokens in all`;
    const states = new Map(told.specialists.map((one) => [one.name, one]));
    const names = [...new Set([...told.drafters, ...states.keys()])].sort();
    $("drafters").replaceChildren(...names.map((name) => {
      const one = states.get(name) ?? { state: "in the router" };
      const counts = router.drafters[name];
      const label = element("span", name);
      const dot = element("span", undefined, "dot");
      dot.style.background = colour(name);
      label.prepend(dot);
      const state = element("span", one.reason ? `${one.state}: ${one.reason}` : one.state, one.state === "away" || one.reason ? "bad" : "");
      return rowOf(label, state, counts ? `${counts.accepted} of ${counts.drafted}` : "");
    }));
    $("replicas").replaceChildren(...Object.entries(told.applications).flatMap(([application, found]) =>
      Object.entries(found.deployments).map(([name, deployment]) => {
        const replicas = Object.entries(deployment.replicas).map(([state, count]) => `${count} ${state.toLowerCase()}`);
        return rowOf(application, name, replicas.join(", ") || "none");
      })));
    const refused = element("table");
    refused.append(element("caption", "Refused lately"));
    refused.append(...router.refusals.slice(0, 5).map((one) => rowOf(new Date(1000 * one.at).toLocaleTimeString(), one.reason)));
    $("refused").replaceChildren(...(router.refusals.length ? [refused] : []));
  } catch {
    $("about").textContent = "the server does not answer";
    $("about").classList.add("bad");
  }
  setTimeout(look, LOOK_MS);
}

$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => running.forEach((control) => control.abort()));
$("clear").addEventListener("click", () => {
  running.forEach((control) => control.abort());
  messages = [];
  $("messages").replaceChildren();
  $("trees").replaceChildren();
  $("text").focus();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
look();
