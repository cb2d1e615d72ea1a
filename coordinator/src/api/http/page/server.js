// What the server is asked, with the key that it may want.

const KEY = "secondwind-api-key";

/** Answers of a chat, chunk by chunk. Throws what the server says. */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", true, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response)) {
    // Several may have come at once.
    signal.throwIfAborted();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("the answer broke off");
}

/** How things stand. With `asks` a key that is missing is asked for. */
export async function rack(asks) {
  const response = await request("/rack", asks, {});
  return response.json();
}

async function request(path, asks, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server cannot be reached");
    }
    if (response.ok) return response;
    const why = await reason(response);
    if (response.status !== 401 || !asks || !(await askForKey(why, key))) throw new Error(why);
  }
}

/** The server's words. */
async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
}

/** The data of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      for (const line of event.split("\n")) {
        if (line.startsWith("data: ")) yield line.slice("data: ".length);
      }
    }
  }
}

const dialog = document.getElementById("key");
const field = document.getElementById("key-value");
document.getElementById("key-cancel").addEventListener("click", () => dialog.close());

let asking = null;

/** Asks for a key in place of `tried`, once for all who want one. False: there is none. */
function askForKey(why, tried) {
  // Another request may have got a key since.
  if (sessionStorage.getItem(KEY) !== tried) return Promise.resolve(true);
  asking ??= new Promise((resolve) => {
    document.getElementById("key-why").textContent = why;
    field.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      // What no header can hold is no key of ours.
      const given = dialog.returnValue === "use" && /^[\x20-\x7e]+$/.test(field.value);
      if (given) sessionStorage.setItem(KEY, field.value);
      field.value = "";
      resolve(given);
    }, { once: true });
  });
  return asking;
}
