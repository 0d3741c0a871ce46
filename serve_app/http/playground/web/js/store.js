// What this browser keeps in IndexedDB: the gallery, and what is under way, so that a reload loses nothing.

const MOST_ITEMS = 200;
const NAME = `triptych ${location.pathname}`; // applications under other prefixes have their own

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function openDatabase() {
  const opening = indexedDB.open(NAME, 1);
  opening.onupgradeneeded = () => {
    opening.result.createObjectStore("items", { keyPath: "id" }).createIndex("at", "at");
    opening.result.createObjectStore("runs", { keyPath: "id" });
  };
  return done(opening);
}

/** {add, all, remove, clear} of both stores; in memory alone, with `trouble`, where the browser keeps nothing. */
export async function openStore() {
  try {
    const database = await openDatabase();
    const within = (name, mode, work) => done(work(database.transaction(name, mode).objectStore(name)));
    return {
      trouble: null,
      all: (name) => within(name, "readonly", (store) => store.getAll()),
      add: (name, item) => within(name, "readwrite", (store) => store.put(item)),
      remove: (name, id) => within(name, "readwrite", (store) => store.delete(id)),
      clear: (name) => within(name, "readwrite", (store) => store.clear()),
    };
  } catch (error) {
    const kept = { items: new Map(), runs: new Map() };
    return {
      trouble: `This browser keeps nothing (${error.name}): the gallery is lost when the page is closed.`,
      all: async (name) => [...kept[name].values()],
      add: async (name, item) => void kept[name].set(item.id, item),
      remove: async (name, id) => void kept[name].delete(id),
      clear: async (name) => kept[name].clear(),
    };
  }
}

/** The items that are too many, the oldest first. */
export function tooMany(items) {
  return [...items].sort((a, b) => a.at - b.at).slice(0, Math.max(0, items.length - MOST_ITEMS));
}
