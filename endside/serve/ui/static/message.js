// One message on the page: who, thought, text, what went wrong, numbers and buttons.

import { Prose, copyText } from "./prose.js";

const WHO = { user: "You", assistant: "Model" };

export class MessageView {
  // actions: [[label, function]], shown below the message
  constructor(message, actions) {
    this.message = message;
    const copy = document.getElementById("message-template").content.cloneNode(true);
    this.item = copy.querySelector("li");
    this.parts = Object.fromEntries(
      ["who", "thought", "attached", "body", "problem", "numbers", "actions"]
        .map((name) => [name, copy.querySelector(`.${name}`)]));
    this.item.classList.add(message.role);
    this.parts.who.textContent = WHO[message.role] ?? message.role;
    if (message.role === "assistant") this.#answer();
    else this.parts.thought.remove();
    for (const [label, act] of actions) this.#button(label, act);
    this.#button("Copy", (button) => copyText(message.content, button));
    this.#files();
  }

  #answer() {
    const { body, thought } = this.parts;
    this.body = new Prose(body);
    this.thought = new Prose(thought.querySelector(".prose"));
    thought.querySelector("summary").addEventListener("click", () => { this.touched = true; });
  }

  #button(label, act) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.textContent = label;
    button.addEventListener("click", () => act(button));
    this.parts.actions.append(button);
  }

  #files() {
    for (const file of this.message.files ?? []) {
      const item = document.createElement("li");
      item.textContent = `${file.name}, ${file.text.length.toLocaleString("en")} characters`;
      this.parts.attached.append(item);
      this.parts.attached.hidden = false;
    }
  }

  // Draws the message as it is now; `writing` while more is to come.
  async draw(writing) {
    const { message, parts } = this;
    this.item.classList.toggle("writing", writing);
    this.item.setAttribute("aria-busy", String(writing));
    this.#numbers();
    parts.problem.hidden = !message.problem;
    parts.problem.textContent = message.problem ?? "";
    if (!this.body) {
      parts.body.textContent = message.content;
      parts.body.classList.add("plain");
      return;
    }
    await Promise.all([this.#drawThought(writing), this.body.show(message.content)]);
  }

  async #drawThought(writing) {
    const { message, parts } = this;
    parts.thought.hidden = !message.reasoning;
    if (!message.reasoning) return;
    const thinking = writing && !message.content;
    // The user's own choice to open or fold it stays.
    if (!this.touched) parts.thought.open = thinking;
    const seconds = message.numbers?.thoughtSeconds;
    parts.thought.querySelector("summary").textContent =
      thinking ? "Thinking …" : `Thought${seconds ? ` for ${seconds.toFixed(1)} s` : ""}`;
    await this.thought.show(message.reasoning);
  }

  #numbers() {
    const { numbers, problem } = this.message;
    const words = [];
    if (numbers?.tokens) words.push(`${numbers.tokens} tokens`);
    if (numbers?.perSecond) words.push(`${numbers.perSecond.toFixed(1)} tokens/s`);
    if (numbers?.firstSeconds) words.push(`first after ${numbers.firstSeconds.toFixed(2)} s`);
    if (numbers?.end === "length") words.push("cut off at the length limit");
    if (numbers?.end === "stopped") words.push("stopped");
    this.parts.numbers.textContent = problem ? "" : words.join(" · ");
  }
}
