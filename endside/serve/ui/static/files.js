// Text files that go with the next message: chosen, dropped or pasted.

const LARGEST = 2_000_000; // bytes of one file

export class Files {
  constructor(list, say) {
    this.list = list;
    this.say = say;
    this.chosen = [];
  }

  async add(files) {
    for (const file of files) {
      if (file.size > LARGEST) {
        this.say(`${file.name} is larger than ${LARGEST / 1e6} MB and was left out.`);
        continue;
      }
      const text = decoded(await file.arrayBuffer());
      if (text === null) this.say(`${file.name} is not a text file and was left out.`);
      else this.chosen.push({ name: file.name, text });
    }
    this.draw();
  }

  take() {
    const files = this.chosen;
    this.chosen = [];
    this.draw();
    return files;
  }

  draw() {
    this.list.replaceChildren(...this.chosen.map((file) => {
      const item = document.createElement("li");
      item.append(`${file.name} `);
      const away = document.createElement("button");
      away.type = "button";
      away.className = "quiet icon";
      away.textContent = "✕";
      away.setAttribute("aria-label", `Leave out ${file.name}`);
      away.addEventListener("click", () => {
        this.chosen = this.chosen.filter((one) => one !== file);
        this.draw();
      });
      item.append(away);
      return item;
    }));
  }
}

// UTF-8 text without zero bytes, or null.
function decoded(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}
