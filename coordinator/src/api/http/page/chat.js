// A conversation. Whatever comes from the server is put in as text, never as HTML.

import { look } from "./rack.js";
import { chat } from "./server.js";

const get = (id) => document.getElementById(id);
const log = get("log");
const empty = get("empty");
const question = get("question");
const sampling = get("sampling");
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** What was said: `role`, `content`, and the `entry` that shows it. */
let said = [];
/** Stops the answer that is under way. */
let running = null;

get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = question.value.trim();
  if (running || !content || !settingsAreGood()) return;
  question.value = "";
  said.push({ role: "user", content, entry: entry("user", "You", content) });
  answer();
});

question.addEventListener("keydown", (event) => {
  // Enter on a touch screen's keyboard is for lines.
  const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (sends && matchMedia("(pointer: fine)").matches) {
    event.preventDefault();
    get("ask").requestSubmit();
  }
});

get("stop").addEventListener("click", () => running?.abort());

get("again").addEventListener("click", () => {
  if (running || !settingsAreGood()) return;
  if (said.at(-1)?.role === "assistant") said.pop();
  // An answer that failed or was stopped at once is shown, but was not kept.
  while (log.lastElementChild !== said.at(-1).entry) log.lastElementChild.remove();
  answer();
});

get("clear").addEventListener("click", () => {
  running?.abort();
  said = [];
  log.replaceChildren(empty);
  empty.hidden = false;
  buttons();
  question.focus();
});

/** Has the model answer what was said last. */
async function answer() {
  const mine = (running = new AbortController());
  const shown = entry("assistant", "Model", "");
  const text = shown.querySelector(".text");
  const note = shown.appendChild(document.createElement("p"));
  note.className = "note";
  note.textContent = "…";
  log.setAttribute("aria-busy", "true");
  buttons();
  const begin = performance.now();
  let first = null;
  let end = "";
  let usage = null;
  try {
    for await (const chunk of chat(body(), mine.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      const { content, reasoning_content } = choice?.delta ?? {};
      if (content || reasoning_content) first ??= performance.now();
      const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      if (reasoning_content) thoughts(shown).append(reasoning_content);
      if (content) text.append(content);
      if (follow) log.scrollTop = log.scrollHeight;
      if (choice?.finish_reason === "length") end = "cut off at max_tokens or the end of the context";
    }
    const words = usage && speed(usage.completion_tokens, begin, first ?? begin);
    note.textContent = [words, end].filter(Boolean).join("; ");
  } catch (error) {
    if (mine.signal.aborted) {
      note.textContent = "stopped";
    } else {
      note.className = "error";
      note.setAttribute("role", "alert");
      note.textContent = error.message;
      look();
    }
  }
  // Nobody waits for an answer to a conversation that was cleared.
  if (running !== mine) return;
  running = null;
  const content = text.textContent;
  if (content) said.push({ role: "assistant", content, entry: shown });
  log.setAttribute("aria-busy", "false");
  log.scrollTop = log.scrollHeight;
  buttons();
}

/** The request. */
function body() {
  const values = Object.fromEntries(new FormData(sampling));
  const messages = said.map(({ role, content }) => ({ role, content }));
  if (values.system.trim()) messages.unshift({ role: "system", content: values.system });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if (values[name] !== "") body[name] = Number(values[name]);
  }
  if (values.enable_thinking) {
    body.chat_template_kwargs = { enable_thinking: values.enable_thinking === "true" };
  }
  return body;
}

/** Shows what the browser thinks is no number. */
function settingsAreGood() {
  if (sampling.checkValidity()) return true;
  get("settings").open = true;
  return sampling.reportValidity();
}

/** An utterance at the end of the conversation. */
function entry(kind, name, content) {
  empty.hidden = true;
  const article = document.createElement("article");
  article.className = kind;
  const who = article.appendChild(document.createElement("h2"));
  who.textContent = name;
  const text = article.appendChild(document.createElement("div"));
  text.className = "text";
  text.append(content);
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return article;
}

/** Where an utterance's reasoning is, folded. */
function thoughts(article) {
  let folded = article.querySelector("details");
  if (!folded) {
    folded = document.createElement("details");
    folded.append(document.createElement("summary"), document.createElement("div"));
    folded.firstChild.textContent = "Reasoning";
    folded.lastChild.className = "text";
    article.querySelector("h2").after(folded);
  }
  return folded.lastChild;
}

function speed(tokens, begin, first) {
  const seconds = (performance.now() - first) / 1000;
  const wait = ((first - begin) / 1000).toFixed(2);
  // The first token is there when the clock begins. What came at once says nothing about the pace.
  const rate = tokens > 1 && seconds > 0.2 ? `, then ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}; first after ${wait} s${rate}`;
}

function buttons() {
  const before = document.activeElement;
  get("send").disabled = Boolean(running);
  get("stop").disabled = !running;
  get("again").disabled = Boolean(running) || said.length === 0;
  get("clear").disabled = said.length === 0;
  // Whoever uses a keyboard must not lose their place with a button; on a touch screen one would pop up.
  if (before.disabled && matchMedia("(pointer: fine)").matches) question.focus();
}
