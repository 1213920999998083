// A growing text as HTML that the server rendered and cleaned.
//
// Blocks that cannot change any more are appended once; only the rest is rendered again, and one
// request at a time: while it is under way the text may grow as fast as it likes.

import { rendered } from "./api.js";

export class Prose {
  constructor(element) {
    this.element = element;
    this.done = element.appendChild(document.createElement("div"));
    this.tail = element.appendChild(document.createElement("div"));
    this.text = "";
    this.settled = 0;
    this.busy = null;
    this.stale = false;
  }

  // The whole text so far. Resolves when it is drawn.
  show(text) {
    this.text = text.replace(/\r\n?/g, "\n");
    this.stale = true;
    this.busy ??= this.#work().finally(() => { this.busy = null; });
    return this.busy;
  }

  async #work() {
    while (this.stale) {
      this.stale = false;
      const rest = this.text.slice(this.settled);
      let part;
      try {
        part = await rendered(rest);
      } catch {
        // Shown as it was written: an answer is worth more than its looks.
        this.tail.textContent = rest;
        this.tail.classList.add("plain");
        return;
      }
      this.tail.classList.remove("plain");
      if (part.html) this.done.append(...nodes(part.html));
      this.tail.replaceChildren(...nodes(part.tail));
      this.settled += part.settled;
      buttons(this.element);
    }
  }
}

function nodes(html) {
  return [...new DOMParser().parseFromString(html, "text/html").body.childNodes];
}

// Every block of code gets its language and a button that copies it.
function buttons(element) {
  for (const block of element.querySelectorAll("pre:not(.ready)")) {
    block.classList.add("ready");
    block.tabIndex = 0;
    const code = block.querySelector("code");
    const bar = document.createElement("div");
    bar.className = "code-bar";
    const language = document.createElement("span");
    language.textContent = code?.className.replace("language-", "") ?? "";
    const copy = document.createElement("button");
    copy.type = "button";
    copy.textContent = "Copy";
    copy.addEventListener("click", () => copyText(code?.textContent ?? "", copy));
    bar.append(language, copy);
    block.before(bar);
  }
}

export async function copyText(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}
