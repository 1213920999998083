// The chat: which conversation is shown, what happens when something is sent, stopped or changed.

import { info } from "./api.js";
import { follow, request } from "./answer.js";
import { Files } from "./files.js";
import { MessageView } from "./message.js";
import * as panels from "./panels.js";
import { conversations, fresh, settings } from "./store.js";

const byId = (id) => document.getElementById(id);
const [log, field, status] = [byId("log"), byId("message"), byId("status")];
const say = (text) => { status.textContent = text; };

let model = { thinks: false, context: 0, model: "" };
let current = fresh();
let running = null; // AbortController of the answer being written
const files = new Files(byId("files"), say);
const side = panels.sidebar();

async function showList() {
  panels.list(await conversations.all(), current.id, choose, remove);
}

async function choose(id) {
  if (running) stop();
  const found = (await conversations.all()).find((one) => one.id === id);
  show(found ?? fresh());
  side.close();
}

async function remove(id) {
  await conversations.remove(id);
  if (id === current.id) show(fresh());
  await showList();
}

function show(conversation) {
  if (running) stop();
  current = conversation;
  settings.write({ current: current.id });
  say("");
  byId("title").textContent = current.title || "New conversation";
  draw();
  context();
  showList();
}

function draw() {
  byId("empty").hidden = current.messages.length > 0;
  const views = current.messages.map((message, at) => view(message, at));
  byId("messages").replaceChildren(...views.map((one) => one.item));
  Promise.all(views.map((one) => one.draw(false))).then(toEnd);
}

function view(message, at) {
  const own = message.role === "user";
  return new MessageView(message, [own ? ["Edit", () => edit(at)] : ["Regenerate", () => again(at)]]);
}

function context() {
  const used = current.messages.findLast((one) => one.numbers?.context)?.numbers.context ?? 0;
  const share = model.context ? used / model.context : 0;
  byId("context").value = share;
  byId("context-text").textContent =
    model.context ? `${used.toLocaleString("en")} / ${model.context.toLocaleString("en")}` : "";
}

async function save(conversation = current) {
  conversation.updated = Date.now();
  try {
    await conversations.save(conversation);
  } catch (error) {
    say(`This browser did not store the conversation: ${error.message}`);
  }
}

async function send(text) {
  current.messages.push({ role: "user", content: text, files: files.take() });
  if (!current.title) current.title = text.split("\n")[0].slice(0, 60) || current.messages[0].files[0]?.name;
  byId("title").textContent = current.title;
  await answer();
}

async function answer() {
  const conversation = current;
  const options = { ...panels.sampling(), model: model.model, thinks: model.thinks, think: byId("think").checked };
  const body = request(conversation, options);
  const message = { role: "assistant", content: "", reasoning: "", problem: null };
  conversation.messages.push(message);
  draw();
  const shown = view(message, conversation.messages.length - 1);
  byId("messages").lastElementChild.replaceWith(shown.item);
  const control = begin();
  await save();
  await showList();
  try {
    const now = regularly(() => save(conversation));
    await follow(body, message, control.signal, () => { now(); progress(shown, message, control); });
  } catch (error) {
    message.problem = error.message;
    if (error.status === 401) dialog.open();
  }
  await save(conversation);
  await shown.draw(false);
  if (conversation === current) {
    toEnd();
    context();
  }
  end(control, message);
}

// Calls `act` at most once a second, so that a closed tab loses no more than that.
function regularly(act) {
  let last = performance.now();
  return () => {
    if (performance.now() - last < 1000) return;
    last = performance.now();
    act();
  };
}

function begin() {
  running = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  say("The model is answering.");
  return running;
}

function progress(shown, message, control) {
  if (running !== control) return;
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const rate = message.numbers.perSecond;
  byId("speed").textContent = rate ? `${rate.toFixed(1)} tokens/s` : "";
  shown.draw(true).then(() => { if (atEnd) toEnd(); });
  if (atEnd) toEnd();
}

function end(control, message) {
  if (running === control) {
    running = null;
    byId("send").hidden = false;
    byId("stop").hidden = true;
    byId("speed").textContent = "";
  }
  say(message.problem ?? (message.numbers?.end === "stopped" ? "Stopped." : "The answer is complete."));
}

function stop() {
  running?.abort();
}

async function again(at) {
  if (running) return;
  current.messages.length = at;
  await answer();
}

function edit(at) {
  if (running) return;
  const message = current.messages[at];
  current.messages.length = at;
  field.value = message.content;
  files.chosen = message.files ?? [];
  files.draw();
  draw();
  grow();
  field.focus();
  say("Change the message and send it again; what followed it is replaced.");
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

function grow() {
  field.rows = 1;
  const line = parseFloat(getComputedStyle(field).lineHeight) || 24;
  field.rows = Math.min(12, Math.max(1, Math.floor(field.scrollHeight / line)));
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = field.value.trim();
  if (running || (!text && !files.chosen.length)) return;
  field.value = "";
  grow();
  send(text);
});
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
field.addEventListener("input", grow);
field.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) {
    event.preventDefault();
    files.add([...event.clipboardData.files]);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !byId("settings").open) stop();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", () => { show(fresh()); side.close(); field.focus(); });
byId("attach").addEventListener("click", () => byId("pick").click());
byId("pick").addEventListener("change", (event) => { files.add([...event.target.files]); event.target.value = ""; });
byId("think").addEventListener("change", (event) => settings.write({ think: event.target.checked }));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  files.add([...event.dataTransfer.files]);
});

async function exportAll() {
  const all = await conversations.all();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(all, null, 1)], { type: "application/json" }));
  link.download = "endside-conversations.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function about() {
  try {
    model = await info();
  } catch (error) {
    say(error.message);
    if (error.status === 401) dialog.open();
    return;
  }
  byId("model").textContent = model.model;
  byId("think-row").hidden = byId("budget-row").hidden = !model.thinks;
  panels.placeholders(model.sampling);
  context();
}

const dialog = panels.settingsDialog({
  system: () => current.system,
  setSystem: (text) => {
    if (text === current.system) return;
    current.system = text;
    if (current.messages.length) save();
  },
  exportAll,
  forgetAll: async () => { await conversations.clear(); show(fresh()); },
  keyChanged: about,
});

panels.theme();
byId("think").checked = settings.read().think ?? true;
const last = (await conversations.all().catch(() => [])).find((one) => one.id === settings.read().current);
show(last ?? fresh());
await about();
field.focus();
