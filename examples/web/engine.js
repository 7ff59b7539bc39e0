// An exported engine in onnxruntime-web: prompt and seed to pixels, the steps of tdm_serve/engine.py for one picture.
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";
import { noise } from "./noise.js";
import { Tokenizer } from "./tokenizer.js";

const TEXT_MULTIPLE = 32; // tokens that Z-Image pads a text to

async function fetched(url, bytes) {
  const answer = await fetch(url).catch((error) => {
    throw new Error(`${url} cannot be fetched: ${error.message}`);
  });
  if (!answer.ok) throw new Error(`${url} cannot be fetched: the server answers ${answer.status}`);
  const data = await answer.arrayBuffer();
  if (bytes !== undefined && data.byteLength !== bytes) {
    throw new Error(`${url} has ${data.byteLength} bytes, and its manifest promises ${bytes}; build the folder again`);
  }
  return new Uint8Array(data);
}

const json = async (url) => JSON.parse(new TextDecoder().decode(await fetched(url)));
const padded = (tokens) => Math.ceil(tokens / TEXT_MULTIPLE) * TEXT_MULTIPLE;
const floats = (data, dims) => new ort.Tensor("float32", data, dims);
const integers = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);

export class Engine {
  // Opens what make_site.py has put into `folder`, one graph after another. `loaded(part)` hears of each.
  static async load(folder, threads, loaded = () => {}) {
    ort.env.wasm.numThreads = threads;
    const artifact = await json(`${folder}/artifact.json`);
    const tokenizer = new Tokenizer(await json(`${folder}/tokenizer.json`), await json(`${folder}/template.json`));
    const sessions = {};
    for (const [part, [file]] of Object.entries(artifact.parts)) {
      sessions[part] = await ort.InferenceSession.create(await fetched(`${folder}/${file.name}`, file.bytes));
      loaded(part);
    }
    return new Engine(artifact, tokenizer, sessions);
  }

  constructor(artifact, tokenizer, sessions) {
    Object.assign(this, { artifact, tokenizer, sessions });
    [this.width, this.height] = artifact.sizes[0];
  }

  // Euler's table for falling noise levels: x' = a x + (1 - a) x0 with a = next / sigma, as tdm_serve/sampling.py has it.
  get rows() {
    const { sigmas } = this.artifact;
    return sigmas.map((sigma, i) => ({ sigma, a: (sigmas[i + 1] ?? 0) / sigma }));
  }

  // Refuses with a sentence what cannot be read.
  tokens(prompt) {
    if (!prompt.trim()) throw new Error("the prompt is empty; it must hold at least one visible character");
    const ids = this.tokenizer.ids(prompt);
    const limit = this.artifact.text;
    if (ids.length > limit) throw new Error(`the prompt has ${ids.length} tokens, and at most ${limit} are read; shorten it`);
    return ids;
  }

  // The picture of a prompt and a seed (a BigInt). `stepped(done, of)` hears when the text is read, and of every
  // evaluation.
  async generate(prompt, seed, stepped = () => {}) {
    const { channels, factor } = this.artifact;
    const text = await this.#text(this.tokens(prompt));
    const dims = [1, channels, this.height / factor, this.width / factor];
    const latents = noise(seed, dims.reduce((a, b) => a * b));
    stepped(0, this.rows.length);
    for (const [index, { sigma, a }] of this.rows.entries()) {
      const modulation = await this.#run("modulation", { sigma: floats([sigma], [1]) });
      const velocity = await this.#run("denoiser", { latents: floats(latents.slice(), dims), modulation, text });
      latents.forEach((x, i) => (latents[i] = a * x + (1 - a) * (x - sigma * velocity.data[i])));
      stepped(index + 1, this.rows.length);
    }
    return this.#picture(latents, dims);
  }

  // Refined text (1, L, D) of token ids; L is their number, padded.
  async #text(ids) {
    const longest = padded(this.artifact.text);
    const all = Array.from({ length: longest }, (_, i) => ids[i] ?? this.tokenizer.template.pad);
    const features = await this.#run("text_encoder", {
      ids: integers(all, [1, longest]),
      mask: integers(all.map((_, i) => Number(i < ids.length)), [1, longest]),
    });
    const width = features.dims[2];
    const data = new Float32Array(padded(ids.length) * width);
    data.set(features.data.subarray(0, ids.length * width));
    return this.#run("refiner", {
      features: floats(data, [1, padded(ids.length), width]),
      lengths: integers([ids.length], [1]),
    });
  }

  async #picture(latents, dims) {
    const { scale, shift } = this.artifact;
    const { data } = await this.#run("decoder", { latents: floats(latents.map((x) => x / scale + shift), dims) });
    const count = this.width * this.height;
    const pixels = new Uint8ClampedArray(4 * count).fill(255); // which rounds and clamps
    for (let i = 0; i < count; i++) for (let c = 0; c < 3; c++) pixels[4 * i + c] = (data[c * count + i] * 0.5 + 0.5) * 255;
    return new ImageData(pixels, this.width, this.height);
  }

  async #run(part, inputs) {
    const session = this.sessions[part];
    return (await session.run(inputs))[session.outputNames[0]];
  }
}
