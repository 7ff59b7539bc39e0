// Byte-level BPE as the `tokenizers` library runs it, from the same tokenizer.json.

// GPT-2's words. JavaScript's \s is not Unicode's: it takes a byte order mark, and leaves out the next-line character.
const WORD =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

// Printable stand-ins for the 256 bytes: themselves where they can be seen, the others from U+0100 on.
const STAND_INS = (() => {
  const seen = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(seen(byte) ? byte : next++));
})();

export class Tokenizer {
  #special;
  #kept = new Map(); // words that were merged already

  // `file` is a parsed tokenizer.json, `template` what the chat template puts before and after a prompt.
  constructor(file, template) {
    const names = file.added_tokens.map((token) => token.content);
    const escaped = names.map((name) => name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.#special = new RegExp(`(${escaped.join("|")})`, "u");
    this.template = template;
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.added = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [pair.join(" "), rank]));
  }

  // Token ids of a prompt inside its chat template.
  ids(prompt) {
    const text = this.template.before + prompt + this.template.after;
    return text.split(this.#special).flatMap((piece) => (this.added.has(piece) ? [this.added.get(piece)] : this.#words(piece)));
  }

  #words(text) {
    return (text.match(WORD) ?? []).flatMap((word) => {
      if (!this.#kept.has(word)) this.#kept.set(word, this.#merged(word));
      return this.#kept.get(word);
    });
  }

  // The ids of one word: its bytes, the neighbours of the lowest rank joined first.
  #merged(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => STAND_INS[byte]);
    const rank = (place) => this.ranks.get(`${parts[place]} ${parts[place + 1]}`) ?? Infinity;
    while (parts.length > 1) {
      let best = 0;
      for (let place = 1; place < parts.length - 1; place++) if (rank(place) < rank(best)) best = place;
      if (rank(best) === Infinity) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts.map((part) => this.vocabulary.get(part));
  }
}
