// What stands around the conversation: the list of others, the settings, the colours.

import { key } from "./api.js";
import { settings } from "./store.js";

const byId = (id) => document.getElementById(id);
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "thinking_budget"];

export function sidebar() {
  const open = (on) => {
    document.body.classList.toggle("sidebar-open", on);
    byId("shade").hidden = !on;
    byId("open-sidebar").setAttribute("aria-expanded", String(on));
    if (on) byId("new").focus();
  };
  byId("open-sidebar").addEventListener("click", () => open(true));
  byId("close-sidebar").addEventListener("click", () => { open(false); byId("open-sidebar").focus(); });
  byId("shade").addEventListener("click", () => open(false));
  return { close: () => open(false) };
}

// One line per conversation; `choose` and `remove` are given its id.
export function list(all, current, choose, remove) {
  byId("conversations").replaceChildren(...all.map((one) => {
    const item = document.createElement("li");
    const name = document.createElement("button");
    name.type = "button";
    name.className = "quiet name";
    name.textContent = one.title || "New conversation";
    if (one.id === current) name.setAttribute("aria-current", "true");
    name.addEventListener("click", () => choose(one.id));
    const away = document.createElement("button");
    away.type = "button";
    away.className = "quiet icon";
    away.textContent = "✕";
    away.setAttribute("aria-label", `Delete ${name.textContent}`);
    away.addEventListener("click", () => remove(one.id));
    item.append(name, away);
    return item;
  }));
}

export function theme() {
  const order = ["auto", "light", "dark"];
  const words = { auto: "as the system", light: "light", dark: "dark" };
  const button = byId("theme");
  const set = (name) => {
    document.documentElement.dataset.theme = name;
    button.setAttribute("aria-label", `Colours: ${words[name]}`);
    button.title = `Colours: ${words[name]}`;
  };
  set(order.includes(settings.read().theme) ? settings.read().theme : "auto");
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(document.documentElement.dataset.theme) + 1) % order.length];
    settings.write({ theme: next });
    set(next);
  });
}

// The sampling values that were filled in, as numbers.
export function sampling() {
  const saved = settings.read().sampling ?? {};
  return Object.fromEntries(FIELDS.filter((name) => Number.isFinite(saved[name])).map((name) => [name, saved[name]]));
}

// use: {system(): text, setSystem(text), exportAll(), forgetAll(), keyChanged()}
export function settingsDialog(use) {
  const dialog = byId("settings");
  const form = byId("settings-form");
  byId("open-settings").addEventListener("click", () => {
    form.elements.system.value = use.system();
    form.elements.key.value = key.get();
    const saved = sampling();
    for (const name of FIELDS) form.elements[name].value = saved[name] ?? "";
    dialog.showModal();
  });
  byId("export").addEventListener("click", use.exportAll);
  byId("forget").addEventListener("click", () => {
    if (confirm("Delete all conversations from this browser?")) use.forgetAll();
  });
  dialog.addEventListener("close", () => {
    const values = {};
    for (const name of FIELDS) {
      const field = form.elements[name];
      if (field.value !== "" && field.checkValidity()) values[name] = Number(field.value);
    }
    settings.write({ sampling: values });
    use.setSystem(form.elements.system.value.trim());
    if (form.elements.key.value !== key.get()) {
      key.set(form.elements.key.value);
      use.keyChanged();
    }
  });
  return { open: () => byId("open-settings").click() };
}

// What the model would use where a field is empty, as its placeholder.
export function placeholders(defaults) {
  const form = byId("settings-form");
  for (const name of FIELDS) {
    const value = defaults?.[name];
    form.elements[name].placeholder = value === undefined || value === null ? "" : String(value);
  }
}
