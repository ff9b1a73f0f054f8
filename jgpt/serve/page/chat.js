"use strict";
// The page: it keeps the conversation, and asks the server's own OpenAI-compatible API. What a model or a person wrote
// becomes text nodes only, never HTML.
const at = (id) => document.getElementById(id);
const RULES = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"];
const state = { messages: [], model: null, request: null, undo: [] };

// --- what is remembered: settings in this browser, the conversation in this tab

function remember() {
  const settings = Object.fromEntries(["system", ...RULES].map((id) => [id, at(id).value]));
  localStorage.setItem("jgpt.settings", JSON.stringify(settings));
  sessionStorage.setItem("jgpt.token", at("token").value);
  sessionStorage.setItem("jgpt.messages", JSON.stringify(state.messages));
  sessionStorage.setItem("jgpt.text", at("text").value);
}

function recall() {
  const read = (store, key, none) => { try { return JSON.parse(store.getItem(key)) ?? none; } catch { return none; } };
  for (const [id, value] of Object.entries(read(localStorage, "jgpt.settings", {}))) if (at(id)) at(id).value = value;
  at("token").value = sessionStorage.getItem("jgpt.token") ?? "";
  const fragment = new URLSearchParams(location.hash.slice(1));
  if (fragment.has("token")) {
    at("token").value = fragment.get("token");
    history.replaceState(null, "", location.pathname);
  }
  state.messages = read(sessionStorage, "jgpt.messages", []);
  at("text").value = sessionStorage.getItem("jgpt.text") ?? "";
}

// --- requests

// Run one request at a time, with the Stop button; returns what is said about it.
async function run(work) {
  const request = new AbortController();
  state.request = request;
  buttons();
  notice("");
  const began = performance.now();
  try {
    const { end, usage } = await work(request.signal);
    const seconds = (performance.now() - began) / 1000;
    const speed = usage ? T.speed(usage.completion_tokens, (usage.completion_tokens / seconds).toFixed(1)) : "";
    return end === "length" ? `${speed}, ${T.cut}` : speed;
  } catch (error) {
    if (error.name === "AbortError") return T.stopped;
    notice(error instanceof ServerError ? error.message : T.lost, true);
    return "";
  } finally {
    state.request = null;
    remember();
    buttons();
  }
}

// --- a conversation

async function answer() {
  const message = { role: "assistant", content: "", meta: "" };
  state.messages.push(message);
  draw();
  const element = at("log").lastElementChild;
  element.classList.add("waiting");
  let planned = false;
  const show = () => {
    planned = false;
    fill(element.querySelector(".body"), message.content);
    follow();
  };
  const onPiece = (text) => {
    message.content += text;
    if (!planned) requestAnimationFrame(show);
    planned = true;
  };
  message.meta = await run((signal) => askWithRoom(state.messages.slice(0, -1), onPiece, signal));
  message.content = message.content.trim();
  if (!message.content) { // refused, or stopped before the first word: the question goes back to where it was typed
    const [asked] = state.messages.splice(-2);
    at("question").value = at("question").value || asked.content;
    grow(at("question"));
  }
  draw();
  remember();
}

// Where the conversation is longer than the context, leave out its oldest turns.
async function askWithRoom(messages, onPiece, signal) {
  const system = at("system").value.trim() ? [{ role: "system", content: at("system").value.trim() }] : [];
  for (let first = 0; ; first += 2) {
    const sent = [...system, ...messages.slice(first).map(({ role, content }) => ({ role, content }))];
    try {
      if (first) notice(T.forgot(first));
      return await ask("/v1/chat/completions", { messages: sent }, onPiece, signal);
    } catch (error) {
      if (error.code !== "context_length_exceeded" || first + 2 >= messages.length) throw error;
    }
  }
}

function draw() {
  const log = at("log");
  log.replaceChildren(...state.messages.map(drawn));
  if (!state.messages.length) log.append(make("p", "empty", T.begin));
  follow(true);
}

function drawn(message, index) {
  const article = make("article", `message ${message.role}`);
  const body = make("div", "body");
  fill(body, message.content);
  const actions = make("div", "actions");
  actions.append(button(T.copy, (event) => copy(message.content, event.target)));
  if (message.role === "user") actions.append(button(T.edit, () => edit(article, index)));
  else actions.append(button(T.retry, () => { state.messages.length = index; answer(); }), make("span", "meta", message.meta));
  article.append(body, actions);
  return article;
}

function edit(article, index) {
  const field = make("textarea");
  field.value = state.messages[index].content;
  const send = () => {
    if (!field.value.trim()) return;
    state.messages.length = index;
    state.messages.push({ role: "user", content: field.value.trim() });
    answer();
  };
  const row = make("div", "buttons");
  const primary = button(T.send, send);
  primary.className = "primary";
  row.append(button(T.cancel, draw), primary);
  article.classList.add("edited");
  article.querySelector(".body").replaceChildren(field);
  article.querySelector(".actions").replaceWith(row);
  onEnter(field, send);
  grow(field);
  field.focus();
}

// Show text: between fences of ``` as code, everything as text nodes.
function fill(element, text) {
  const parts = text.split(/^```[^\n`]*\n?/m);
  element.replaceChildren(...parts.map((part, i) => {
    const code = i % 2 === 1;
    const shown = code ? part.replace(/\n$/, "") : part.replace(i ? /^\n/ : /^/, "").replace(i < parts.length - 1 ? /\n$/ : /$/, "");
    return code ? make("pre", "", shown) : document.createTextNode(shown);
  }));
}

// --- a text that goes on, for a model without a chat template

async function goOn() {
  const text = at("text");
  state.undo.push(text.value);
  text.readOnly = true;
  const said = await run((signal) => ask("/v1/completions", { prompt: text.value }, (piece) => {
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 60;
    text.value += piece;
    if (atEnd) text.scrollTop = text.scrollHeight;
  }, signal));
  text.readOnly = false;
  if (said) notice(said);
  remember();
}

// --- the parts of the page

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

function button(label, onClick) {
  const element = make("button", "", label);
  element.type = "button";
  element.addEventListener("click", (event) => { if (!state.request) onClick(event); });
  return element;
}

function notice(text, wrong = false) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
  at("notice").classList.toggle("wrong", wrong);
}

function follow(always = false) {
  const log = at("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// Enter sends, Shift+Enter is a new line; not while an input method composes a word, nor on a phone.
function onEnter(field, send) {
  field.addEventListener("input", () => grow(field));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
    event.preventDefault();
    send();
  });
}

function buttons() {
  const busy = Boolean(state.request);
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  for (const id of ["new", "save", "undo"]) at(id).disabled = busy;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // only https and localhost have a clipboard
    const field = make("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = T.copied;
  setTimeout(() => { button.textContent = T.copy; }, 1200);
}

function save() {
  const system = at("system").value.trim();
  const said = state.messages.map(({ role, content }) => ({ role, content }));
  const line = state.model.jgpt.chat
    ? { messages: [...(system ? [{ role: "system", content: system }] : []), ...said] }
    : { text: at("text").value };
  if (state.model.jgpt.chat ? said.length < 2 : !line.text) return notice(T.nothing);
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify(line)}\n`], { type: "application/jsonl" }));
  link.download = `${state.model.jgpt.chat ? "chat" : "text"}-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  notice((state.model.jgpt.chat ? T.saved : T.saved_text) + link.download);
}

function send() {
  if (state.request || !state.model) return;
  if (!state.model.jgpt.chat) return goOn();
  const question = at("question").value.trim();
  if (!question) return;
  at("question").value = "";
  grow(at("question"));
  state.messages.push({ role: "user", content: question });
  answer();
}

async function connect() {
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  if (!response || !response.ok) return notice(response?.status === 401 ? T.need_token : T.lost, true);
  state.model = (await response.json()).data[0];
  const { chat, sampling, max_new_tokens, step } = state.model.jgpt;
  document.title = at("model").textContent = state.model.id + (step === null ? "" : ` · ${step}`);
  document.body.classList.toggle("chats", chat);
  at("log").hidden = at("question").hidden = !chat;
  at("text").hidden = at("undo").hidden = chat;
  if (!chat) at("send").textContent = T.continue;
  for (const [name, value] of Object.entries(sampling)) at(name).placeholder = value;
  at("max_tokens").max = max_new_tokens;
  notice("");
}

document.documentElement.lang = LANGUAGE === "zh" ? "zh-CN" : "en";
for (const element of document.querySelectorAll("[data-t]")) element.textContent = T[element.dataset.t];
for (const element of document.querySelectorAll("[data-t-placeholder]")) element.placeholder = T[element.dataset.tPlaceholder];
at("question").placeholder = T.ask;
at("text").placeholder = T.write;
at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("stop").addEventListener("click", () => state.request?.abort());
at("undo").addEventListener("click", () => { if (state.undo.length) at("text").value = state.undo.pop(); });
at("save").addEventListener("click", save);
at("new").addEventListener("click", () => { state.messages = []; at("text").value = ""; notice(""); draw(); remember(); });
at("open-settings").addEventListener("click", () => at("settings").showModal());
at("defaults").addEventListener("click", () => { for (const id of RULES) at(id).value = ""; });
at("settings").addEventListener("close", () => { remember(); connect(); });
onEnter(at("question"), send);
recall();
draw();
buttons();
connect();
