// The two views, and what the rack does, while somebody looks.

import { rack } from "./server.js";

const get = (id) => document.getElementById(id);
const EVERY_MS = 1000;
const PARTS = ["compute", "exchange", "wait"];

const onRack = () => location.hash === "#rack";

function show() {
  get("chat-view").hidden = onRack();
  get("rack-view").hidden = !onRack();
  for (const link of document.querySelectorAll("nav a")) {
    const here = (link.hash === "#rack") === onRack();
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  asks = true;
  look();
}
addEventListener("hashchange", show);
document.addEventListener("visibilitychange", () => document.hidden || look());

let polling = false;
let serving = false;
/** Whether to ask for a key where one is missing: not again and again. */
let asks = true;

/** Looks again and again while the rack is on the screen, or something is wrong with it. */
export async function look() {
  if (polling) return;
  polling = true;
  do {
    try {
      const found = await rack(asks);
      serving = found.state === "serving";
      tell(found);
    } catch (error) {
      serving = asks = false;
      unreachable(error.message);
    }
    await new Promise((wake) => setTimeout(wake, EVERY_MS));
  } while (!document.hidden && (onRack() || !serving));
  polling = false;
}

function tell(found) {
  put(get("model"), found.model.id);
  put(get("state"), found.state.replace("_", " "));
  get("state").dataset.state = found.state;
  get("thinking").hidden = !found.model.takes_enable_thinking;
  const { group, load, sequences, kv_blocks } = found;
  const context = `${found.model.architecture}, ${found.model.max_context_tokens} tokens of context`;
  put(get("detail"), group ? `${context}, secondwind ${found.version}` : found.detail);
  const figures = {
    output: rate(load.output_tokens_per_second),
    prompt: rate(load.prompt_tokens_per_second),
    steps: rate(load.steps_per_second),
    ...sequences,
    ...kv_blocks,
  };
  for (const [name, value] of Object.entries(figures)) {
    put(document.querySelector(`[data-figure=${name}]`), String(value));
  }
  const [used, cached] = get("blocks").children;
  width(used, kv_blocks.used / kv_blocks.total);
  width(cached, kv_blocks.cached / kv_blocks.total);
  get("figures").hidden = false;
  get("group").hidden = !group;
  if (group) tellGroup(group, load.straggler);
}

function unreachable(why) {
  put(get("state"), "not known");
  get("state").dataset.state = "unknown";
  put(get("detail"), why);
  get("figures").hidden = true;
  get("group").hidden = true;
}

/** Of which group the list of ranks is, and how each of them is brought up to date. */
let listed = null;
let updates = [];

function tellGroup(group, straggler) {
  const ranks = group.ranks;
  put(get("plan"), `Epoch ${group.epoch}: ${ranks.length} ${ranks.length === 1 ? "rank" : "ranks"}`);
  const now = JSON.stringify([group.epoch, ranks.map((rank) => rank.worker)]);
  if (now !== listed) {
    listed = now;
    const cards = ranks.map((rank) => card(rank, ranks));
    get("ranks").replaceChildren(...cards.map(([element]) => element));
    updates = cards.map(([, update]) => update);
  }
  ranks.forEach((rank, index) => updates[index](rank.time, index === straggler));
  get("legend").hidden = ranks.every((rank) => rank.time && rank.time.compute === undefined);
}

/** A rank's entry, and what to call with its time. */
function card(rank, ranks) {
  const badge = make("span", { className: "badge", hidden: true }, "others wait for it");
  const title = make("h3", {}, `Rank ${rank.rank}: ${rank.worker}`, badge);
  const bars = PARTS.map((part) => make("span", { className: part }));
  const bar = make("div", { className: "bar", ariaHidden: "true" }, ...bars);
  const words = make("p", { className: "note" });
  const facts = make("dl", {});
  const fact = (name, ...value) => facts.append(make("dt", {}, name), make("dd", {}, ...value));
  for (const [name, axis] of [["query heads", "query_heads"], ["FFN channels", "ffn"], ["vocabulary", "vocab"]]) {
    fact(name, ...range(rank[axis], ranks.map((other) => other[axis])));
  }
  fact("memory", `${bytes(rank.planned_bytes)} planned, ${bytes(rank.resident_bytes)} resident`);
  const choices = make("ul", {}, ...rank.choices.map((choice) => make("li", {}, choice)));
  const paths = make("details", {}, make("summary", {}, "Paths chosen"), choices);
  const element = make("li", {}, title, make("p", {}, rank.device), bar, words, facts, paths);
  const update = (time, straggles) => {
    badge.hidden = !straggles;
    PARTS.forEach((part, index) => width(bars[index], time?.[part] ?? 0));
    put(words, sentence(time));
  };
  return [element, update];
}

function sentence(time) {
  if (!time) return "idle in the last seconds";
  const busy = `at steps ${percent(time.busy)} of the time`;
  if (time.compute === undefined) return `${busy}; devices sum by themselves, so how long that takes is not known`;
  return `${busy}; of that compute ${percent(time.compute)}, exchange ${percent(time.exchange)}, waiting ${percent(time.wait)}`;
}

/** Where a range lies within the axis that all ranges tile, in words and as a bar. */
function range(own, all) {
  const ends = (text) => text.split("..").map(Number);
  const whole = Math.max(...all.map((other) => ends(other)[1]));
  const [start, end] = ends(own);
  const mark = make("span", {});
  mark.style.marginInlineStart = `${(100 * start) / whole}%`;
  width(mark, (end - start) / whole);
  const bar = make("div", { className: "bar range", ariaHidden: "true" }, mark);
  return [`${end - start} of ${whole}, from ${start}`, bar];
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Sets a text only if it is another: what is read out is not read out again. */
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function width(element, share) {
  element.style.width = `${100 * (share || 0)}%`;
}

// Number and sign stay on one line.
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit + 1 < units.length) {
    count /= 1024;
    unit += 1;
  }
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

show();
