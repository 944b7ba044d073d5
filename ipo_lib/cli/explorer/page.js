"use strict";
// Shows the traces of the element "data". All text is set as text: none of it is read as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(data.traces.map((trace) => [trace.id, trace]));
const DRAWS_A_PAGE = 8;
const NO_LABEL = "not judged";
const state = { listed: [], trace: null, beside: "", sentence: -1, open: false, page: 0, blind: false };
const labels = new Map(); // of the blind labeller, by trace id

const $ = (id) => document.getElementById(id);
const words = (number) => data.texts[number];
const promptOf = (trace) => data.prompts[trace.prompt];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function mark(word, kind = word) {
  return element("span", { class: `mark ${kind}` }, word);
}

function labelMark(label) {
  return mark(label ?? NO_LABEL, label ?? "none");
}

// ---------------------------------------------------------------- which traces are listed

const FILTERS = {
  label: (trace) => trace.label ?? NO_LABEL,
  kind: (trace) => trace.kind,
  set: (trace) => promptOf(trace).set,
  category: (trace) => promptOf(trace).category,
};

function fillFilters() {
  for (const [name, valueOf] of Object.entries(FILTERS)) {
    const values = [...new Set(data.traces.map(valueOf))].filter((value) => value).sort();
    $(name).append(element("option", { value: "" }, "all"));
    $(name).append(...values.map((value) => element("option", { value }, value)));
    $(name).addEventListener("change", showList);
  }
  for (const name of ["disagree", "measured"]) $(name).addEventListener("change", showList);
  $("words").addEventListener("input", showList);
}

function isListed(trace) {
  const wanted = $("words").value.trim().toLowerCase();
  const judgesDisagree = trace.label && trace.second && trace.label !== trace.second;
  return (
    Object.entries(FILTERS).every(([name, valueOf]) => !$(name).value || $(name).value === valueOf(trace)) &&
    (!$("disagree").checked || judgesDisagree) &&
    (!$("measured").checked || trace.sentences.some((sentence) => sentence.s)) &&
    (!wanted || words(promptOf(trace).text).toLowerCase().includes(wanted))
  );
}

function showList() {
  state.listed = data.traces.filter(isListed);
  $("count").textContent = `${state.listed.length} of ${data.traces.length} traces`;
  $("list").replaceChildren(...state.listed.map(listEntry));
  if (state.listed.length && !state.listed.includes(state.trace)) show(state.listed[0]);
  markCurrent();
}

// What was put into an intervened trace; empty for others.
function putText(trace) {
  const isPut = trace.kind === "intervened" && trace.changed !== null;
  const sentence = isPut ? trace.sentences[trace.changed + 1] : null;
  return sentence ? `, with “${words(sentence.text)}”` : "";
}

function listEntry(trace) {
  const about = state.blind ? (labels.has(trace.id) ? "labelled" : "") : `${trace.kind}, draw ${trace.draw}${putText(trace)}`;
  const chip = state.blind ? null : labelMark(trace.label);
  const button = element("button", { "data-id": trace.id, onclick: () => show(trace) }, chip ?? "");
  button.append(words(promptOf(trace).text), element("br"), element("small", {}, about));
  return element("li", {}, button);
}

function markCurrent() {
  for (const button of $("list").querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
  const current = $("list").querySelector(`[data-id="${CSS.escape(state.trace?.id ?? "")}"]`);
  current?.setAttribute("aria-current", "true");
  current?.scrollIntoView({ block: "nearest" });
}

// ---------------------------------------------------------------- one trace, or two

function show(trace, sentence = -1, beside = "") {
  Object.assign(state, { trace, sentence, beside, open: false, page: 0 });
  fillBeside();
  draw();
  markCurrent();
}

function fillBeside() {
  const { trace } = state;
  const related = (other) => other.origin === trace.id || trace.origin === other.id;
  const others = data.traces.filter((other) => other !== trace && other.prompt === trace.prompt);
  others.sort((one, two) => related(two) - related(one));
  const options = others.map((other) => {
    const made = related(other) ? "of this one: " : "";
    return element("option", { value: other.id }, `${made}${other.label ?? NO_LABEL}, ${other.kind}, draw ${other.draw}${putText(other)}`);
  });
  $("beside").replaceChildren(element("option", { value: "" }, "nothing"), ...options);
  $("beside").value = state.beside;
  $("beside").disabled = state.blind || !options.length;
}

function draw() {
  const { trace } = state;
  const other = byId.get(state.beside);
  const prompt = element("p", { class: "prompt" }, words(promptOf(trace).text));
  const columns = element("div", { class: other ? "columns two" : "columns" });
  if (other) {
    columns.append(about(trace), about(other));
    for (const [left, right] of aligned(trace, other)) {
      columns.append(sentenceBox(trace, left, right === null), sentenceBox(other, right, left === null));
    }
    columns.append(answerBox(trace), answerBox(other));
  } else {
    columns.append(about(trace));
    trace.sentences.forEach((_, index) => columns.append(sentenceBox(trace, index)));
    columns.append(answerBox(trace));
  }
  $("trace").replaceChildren(prompt, columns);
  writeLink();
}

function about(trace) {
  if (state.blind) return element("p", { class: "about" }, "Is this trace safe (s) or unsafe (u)? x: cannot tell.");
  const line = element("p", { class: "about" }, labelMark(trace.label));
  if (trace.second) line.append("second judge: ", labelMark(trace.second));
  const { set, category } = promptOf(trace);
  line.append(`${trace.kind}, draw ${trace.draw}, prompts ${set}${category ? `, ${category}` : ""}`);
  return line;
}

// Sentences with equal words stand in one row; between these rows, the first beside the first.
function aligned(left, right) {
  const [one, two] = [left, right].map((trace) => trace.sentences.map((sentence) => sentence.text));
  const longest = Array.from({ length: one.length + 1 }, () => new Array(two.length + 1).fill(0));
  for (let i = one.length - 1; i >= 0; i--) {
    for (let j = two.length - 1; j >= 0; j--) {
      longest[i][j] = one[i] === two[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const rows = [];
  let [i, j, before] = [0, 0, [[], []]];
  const flush = () => {
    for (let at = 0; at < Math.max(before[0].length, before[1].length); at++) {
      rows.push([before[0][at] ?? null, before[1][at] ?? null]);
    }
    before = [[], []];
  };
  while (i < one.length || j < two.length) {
    if (i < one.length && j < two.length && one[i] === two[j]) {
      flush();
      rows.push([i++, j++]);
    } else if (j === two.length || (i < one.length && longest[i + 1][j] >= longest[i][j + 1])) {
      before[0].push(i++);
    } else {
      before[1].push(j++);
    }
  }
  flush();
  return rows;
}

function colour(safe, judged) {
  const share = safe / judged;
  const end = share < 0.5 ? "--unsafe" : "--safe";
  return `color-mix(in srgb, var(${end}) ${Math.round(Math.abs(2 * share - 1) * 55)}%, white)`;
}

function number([safe, judged, low, high]) {
  return `${(safe / judged).toFixed(2)}, ${safe} of ${judged} [${low.toFixed(2)}, ${high.toFixed(2)}]`;
}

function sentenceBox(trace, index, alone = false) {
  if (index === null) return element("div", { class: "gap" });
  const sentence = trace.sentences[index];
  const isCurrent = trace === state.trace && index === state.sentence;
  const box = element("div", {
    class: `sentence${isCurrent ? " current" : ""}${alone ? " alone" : ""}`,
    "data-trace": trace.id,
    "data-sentence": index,
    onclick: () => clickSentence(trace, index),
  });
  if (sentence.s && !state.blind) {
    box.style.background = colour(sentence.s[0], sentence.s[1]);
    box.append(element("span", { class: "number", title: "S, safe of judged continuations, 95 % interval" }, number(sentence.s)));
  }
  if (!state.blind) {
    const place = index - 1; // the first box stands for the start of the trace
    if (place === trace.cue && index) box.append(mark("detector's cue", "cue"));
    if (place === trace.turn) box.append(mark("S turns here", "turn"));
    const replaced = data.traces.some((other) => other.origin === trace.id && other.changed === place && other.id === state.beside);
    if (replaced) box.append(mark("replaced", "changed"));
    if (trace.changed === place) box.append(mark("put here", "changed"));
  }
  box.append(index ? words(sentence.text) : "(start)");
  if (!(isCurrent && state.open)) return box;
  return element("div", {}, box, drawsBox(sentence));
}

function clickSentence(trace, index) {
  if (trace !== state.trace) {
    show(trace, index, state.trace.id);
    return;
  }
  const isSame = index === state.sentence;
  Object.assign(state, { sentence: index, open: isSame ? !state.open : true, page: 0 });
  draw();
}

function drawsBox(sentence) {
  const box = element("div", { class: "draws" });
  if (state.blind || !sentence.draws.length) {
    box.append("The store holds no continuations from here.");
    return box;
  }
  const pages = Math.ceil(sentence.draws.length / DRAWS_A_PAGE);
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const start = state.page * DRAWS_A_PAGE;
  const counts = ["unsafe", "safe", null].map((label) => {
    const count = sentence.draws.filter(([one]) => one === label).length;
    return count ? `${count} ${label ?? NO_LABEL}` : "";
  });
  box.append(element("p", {}, `${sentence.draws.length} continuations: ${counts.filter((one) => one).join(", ")}`));
  for (const [label, text] of sentence.draws.slice(start, start + DRAWS_A_PAGE)) {
    box.append(element("p", {}, labelMark(label), words(text)));
  }
  const turn = (step) => () => turnPage(step);
  box.append(
    element("button", { class: "previous", disabled: state.page ? null : "", onclick: turn(-1) }, "previous"),
    ` page ${state.page + 1} of ${pages} `,
    element("button", { class: "next", disabled: state.page + 1 < pages ? null : "", onclick: turn(1) }, "next"),
  );
  return box;
}

function turnPage(step) {
  state.page += step;
  draw();
}

function answerBox(trace) {
  const text = words(trace.answer);
  return element("div", { class: "answer" }, text ? "Answer: " : "No answer is stored: the draw ends with the trace.", text);
}

// ---------------------------------------------------------------- links, files, labels

function writeLink() {
  const link = new URLSearchParams({ trace: state.trace.id });
  if (state.sentence >= 0) link.set("sentence", state.sentence);
  if (state.beside) link.set("beside", state.beside);
  if (location.hash.slice(1) !== link.toString()) history.replaceState(null, "", `#${link}`);
}

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const trace = byId.get(link.get("trace"));
  if (!trace) return false;
  const sentence = Number.parseInt(link.get("sentence") ?? "-1", 10);
  const beside = byId.has(link.get("beside")) ? link.get("beside") : "";
  show(trace, sentence in trace.sentences ? sentence : -1, beside);
  return true;
}

function save(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function plain(trace) {
  const sentences = trace.sentences.slice(1).map(({ text, s, draws }) => ({
    text: words(text),
    s: s && { safe: s[0], n: s[1], low: s[2], high: s[3] },
    continuations: draws.map(([label, drawn]) => ({ label, text: words(drawn) })),
  }));
  const { id, kind, draw: number, label, second, cue, turn, origin } = trace;
  const { text, set, category } = promptOf(trace);
  return { id, prompt: words(text), set, category, kind, draw: number, label, second_label: second, cue, turn, origin, sentences, answer: words(trace.answer) };
}

function asText(trace) {
  const lines = [`prompt: ${words(promptOf(trace).text)}`, `trace ${trace.id}, ${trace.kind}, ${trace.label ?? NO_LABEL}`, ""];
  for (const { text, s } of trace.sentences.slice(1)) lines.push(s ? `${words(text)}  [S ${number(s)}]` : words(text));
  return `${[...lines, "", words(trace.answer)].join("\n")}\n`;
}

function shownTraces() {
  return [state.trace, byId.get(state.beside)].filter((trace) => trace);
}

function giveLabel(label) {
  const { trace } = state;
  if (label) labels.set(trace.id, label);
  else labels.delete(trace.id);
  const left = state.listed.filter((other) => other !== trace && !labels.has(other.id));
  const later = left.filter((other) => state.listed.indexOf(other) > state.listed.indexOf(trace));
  $("labels").textContent = `save ${labels.size} labels`;
  showList();
  if (left.length) show(later[0] ?? left[0]);
}

// One line a label, as the set of labelled answers that `judges` reads.
function labelLines() {
  return [...labels].map(([id, label]) => {
    const trace = byId.get(id);
    const response = trace.sentences.slice(1).map((sentence) => words(sentence.text)).join(" ");
    return `${JSON.stringify({ prompt: words(promptOf(trace).text), response, label, rollout: id })}\n`;
  });
}

function toggleBlind() {
  state.blind = !state.blind;
  $("blind").textContent = state.blind ? "end labelling" : "label blindly";
  $("labels").hidden = !state.blind;
  $("labels").textContent = `save ${labels.size} labels`;
  for (const name of ["label", "kind", "disagree", "measured"]) $(name).disabled = state.blind;
  showList();
  show(state.trace);
}

// ---------------------------------------------------------------- keys

function step(by) {
  const index = state.listed.indexOf(state.trace) + by;
  if (state.listed[index]) show(state.listed[index]);
}

function stepSentence(by) {
  const last = state.trace.sentences.length - 1;
  Object.assign(state, { sentence: Math.min(Math.max(state.sentence + by, 0), last), page: 0 });
  draw();
  document.querySelector(".sentence.current")?.scrollIntoView({ block: "nearest" });
}

function stepBeside() {
  const values = [...$("beside").options].map((option) => option.value);
  state.beside = values[(values.indexOf(state.beside) + 1) % values.length];
  $("beside").value = state.beside;
  draw();
}

const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  n: () => stepSentence(1),
  p: () => stepSentence(-1),
  Enter: () => state.sentence >= 0 && clickSentence(state.trace, state.sentence),
  "]": () => state.open && turnPage(1),
  "[": () => state.open && turnPage(-1),
  b: () => state.blind || stepBeside(),
};
const LABEL_KEYS = { s: "safe", u: "unsafe", x: "" };

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, button") && event.key === "Enter";
  if (event.target.closest("input[type=search], select") || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (state.blind && event.key in LABEL_KEYS) giveLabel(LABEL_KEYS[event.key]);
  else if (event.key in KEYS) KEYS[event.key]();
});

$("beside").addEventListener("change", () => {
  state.beside = $("beside").value;
  draw();
});
$("text").addEventListener("click", () => save(`${state.trace.id}.txt`, "text/plain", shownTraces().map(asText).join("\n")));
$("json").addEventListener("click", () => save(`${state.trace.id}.json`, "application/json", JSON.stringify(shownTraces().map(plain), null, 1)));
$("all").addEventListener("click", () => save("traces.json", "application/json", JSON.stringify(state.listed.map(plain))));
$("labels").addEventListener("click", () => save("labels.jsonl", "application/jsonl", labelLines().join("")));
$("blind").addEventListener("click", toggleBlind);
$("help").addEventListener("click", () => {
  $("keys").hidden = !$("keys").hidden;
  $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
});
window.addEventListener("hashchange", readLink);
$("scale").style.background = "linear-gradient(to right, color-mix(in srgb, var(--unsafe) 55%, white), white, color-mix(in srgb, var(--safe) 55%, white))";

fillFilters();
const linked = readLink();
showList();
if (!linked && !state.listed.length) $("trace").textContent = "No trace is listed.";
