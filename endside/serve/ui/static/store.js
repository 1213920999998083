// Conversations, kept in this browser (IndexedDB), and small settings (local storage).
//
// conversation = {id, title, updated, system, messages}
// message = {role, content, reasoning, files: [{name, text}], numbers, problem}

const NAME = "endside";
const SHELF = "conversations";
let opened;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(SHELF, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function shelf(mode, use) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(SHELF, mode);
    const request = use(transaction.objectStore(SHELF));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export const conversations = {
  async all() {
    const found = await shelf("readonly", (store) => store.getAll());
    return found.sort((a, b) => b.updated - a.updated);
  },
  save: (one) => shelf("readwrite", (store) => store.put(structuredClone(one))),
  remove: (id) => shelf("readwrite", (store) => store.delete(id)),
  clear: () => shelf("readwrite", (store) => store.clear()),
};

export function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", updated: Date.now(), system: "", messages: [] };
}

export const settings = {
  read() {
    try {
      return JSON.parse(localStorage.getItem(NAME)) ?? {};
    } catch {
      return {};
    }
  },
  write(changes) {
    localStorage.setItem(NAME, JSON.stringify({ ...settings.read(), ...changes }));
  },
};
