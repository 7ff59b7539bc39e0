// The engine in a thread of its own, so that the page stays alive. Answers orders {prompt, seed} with messages of a kind.
import { Engine } from "./engine.js";

const tell = (kind, what) => postMessage({ kind, ...what });
const threads = Number(new URLSearchParams(location.search).get("threads") ?? 1); // one works on any server
const refuse = (error) => tell("failed", { message: error.message });

Engine.load("engine", threads, (part) => tell("loaded", { part })).then((engine) => {
  onmessage = ({ data: { prompt, seed } }) => {
    const stepped = (done, of) => tell("stepped", { done, of, at: performance.now() });
    engine.generate(prompt, seed, stepped).then((picture) => tell("done", { picture }), refuse);
  };
  const bytes = performance.getEntriesByType("resource").reduce((sum, entry) => sum + entry.encodedBodySize, 0);
  tell("ready", { bytes, threads });
}, refuse);
