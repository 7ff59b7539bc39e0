// The page: a form, progress by evaluation, the picture, and what it cost. The work is done in worker.js.

const at = (id) => document.getElementById(id);
const since = (start) => (performance.now() - start) / 1000;

let started = 0; // milliseconds: of the page, and then of the latest order
let marks = []; // by the worker's clock: when the latest order's text was read, and after each of its evaluations

function figure(id, value, text) {
  at(id).value = value;
  at(id).textContent = text;
}

function say(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("failed", failed);
}

// What the page and its worker hold. WebAssembly's memory never shrinks, so its peak is in it.
async function measureMemory() {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return;
  const { bytes } = await performance.measureUserAgentSpecificMemory();
  figure("memory", bytes, `${(bytes / 1e6).toFixed(0)} MB`);
}

const heard = {
  loaded: ({ part }) => say(`loaded ${part}`),
  ready({ bytes, threads }) {
    figure("load", since(started), `${since(started).toFixed(1)} s`);
    figure("download", bytes, `${(bytes / 1e6).toFixed(1)} MB`);
    figure("threads", threads, `${threads}`);
    say("ready");
    at("generate").disabled = false;
  },
  stepped({ done, of, at: mark }) {
    marks.push(mark);
    at("progress").value = done / of;
    say(`${done} of ${of} evaluations`);
  },
  done({ picture }) {
    const total = since(started);
    Object.assign(at("picture"), { width: picture.width, height: picture.height });
    at("picture").getContext("2d").putImageData(picture, 0, 0);
    const each = marks.slice(1).map((mark, i) => (mark - marks[i]) / 1000);
    figure("evaluation", each.join(" "), `${((1000 * each.reduce((a, b) => a + b)) / each.length).toFixed(0)} ms`);
    figure("total", total, `${total.toFixed(2)} s`);
    say("done");
    at("generate").disabled = false;
    measureMemory();
  },
  failed({ message }) {
    say(message, true);
    at("generate").disabled = !at("load").value; // nothing can be made where loading failed
  },
};

const worker = new Worker(`worker.js${location.search}`, { type: "module" });
worker.onmessage = ({ data }) => heard[data.kind](data);
worker.onerror = (event) => say(event.message ?? "worker.js cannot be loaded", true);

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const seed = at("seed").value.trim();
  if (!/^\d+$/.test(seed) || BigInt(seed) >= 2n ** 63n) {
    say(`seed is "${seed}"; it must be a whole number between 0 and ${2n ** 63n - 1n}`, true);
    return;
  }
  at("generate").disabled = true;
  at("progress").value = 0;
  say("reading the prompt");
  [started, marks] = [performance.now(), []];
  worker.postMessage({ prompt: at("prompt").value, seed: BigInt(seed) });
});
