// Adapters of a switchable artifact in onnxruntime-web (or onnxruntime-node): load, switch, mix.
//
//   const session = await SlotSession.create(ort, { model, data });
//   session.load("sql", await bytesOf("adapters/sql.safetensors"));
//   session.use("sql");                        // requests from now on
//   session.use({ sql: 0.7, poems: 0.3 });     // a mix
//   session.use(null);                         // the base alone
//
// It has the interface of ort.InferenceSession, so it can take the place of one: see `attach`.

import { readFacts, withoutInitializers } from "./protobuf.js";
import { readSafetensors } from "./safetensors.js";

export { readSafetensors };

/** The bytes behind an address, or those that were given. */
export async function bytesOf(source) {
  if (source instanceof Uint8Array) return source;
  if (source instanceof ArrayBuffer) return new Uint8Array(source);
  const answer = await fetch(source);
  if (!answer.ok) throw new Error(`${source}: status ${answer.status}, expected a file`);
  return new Uint8Array(await answer.arrayBuffer());
}

export class SlotSession {
  #ort;
  #session;
  #slots;
  #modelVersion;
  #adapters = new Map();
  #nothing = new Map();
  #chosen;
  #mixes = new Map();

  /**
   * `source.model` is onnx/model.onnx and `source.data` onnx/model.onnx_data: addresses or bytes.
   * `options` are those of ort.InferenceSession.create.
   */
  static async create(ort, source, options = {}) {
    const bytes = await bytesOf(source.model);
    const facts = readFacts(bytes);
    if (!facts.slots?.length) {
      throw new Error("graph: no slots for adapters, expected an artifact of target onnx-switchable");
    }
    const names = new Set(facts.slots.flatMap((slot) => [slot.a, slot.b]));
    const graph = withoutInitializers(bytes, names);
    const external = source.data
      ? [{ path: source.dataName ?? "model.onnx_data", data: await bytesOf(source.data) }]
      : [];
    const inner = await ort.InferenceSession.create(graph, {
      logSeverityLevel: 3, // errors: the warnings are about its own optimizer
      ...options,
      externalData: external,
    });
    return new SlotSession(ort, inner, facts);
  }

  constructor(ort, session, facts) {
    this.#ort = ort;
    this.#session = session;
    this.#slots = facts.slots;
    this.#modelVersion = facts.model_version;
    for (const slot of facts.slots) {
      this.#nothing.set(slot.a, this.#tensor(new Float32Array(0), [slot.inputs, 0]));
      this.#nothing.set(slot.b, this.#tensor(new Float32Array(0), [0, slot.outputs]));
    }
    this.#chosen = this.#nothing;
  }

  /** The inputs that the caller feeds: those of the graph without its slots. */
  get inputNames() {
    return this.#session.inputNames.filter((name) => !this.#nothing.has(name));
  }

  get inputMetadata() {
    return this.#session.inputMetadata?.filter((value) => !this.#nothing.has(value.name));
  }

  get outputNames() {
    return this.#session.outputNames;
  }

  get outputMetadata() {
    return this.#session.outputMetadata;
  }

  /** The names that `use` takes. */
  get adapters() {
    return [...this.#adapters.keys()];
  }

  /** Add an adapter from the bytes of its .safetensors file, or put another in its place. */
  load(name, content) {
    const { metadata, tensors } = readSafetensors(content);
    const stamp = JSON.parse(metadata.adaptrix ?? "{}").model_version;
    if (stamp !== this.#modelVersion) {
      throw new Error(
        `adapter ${name}: made for model version ${stamp}, expected ${this.#modelVersion}; ` +
          "it belongs to another base or build",
      );
    }
    const known = new Set(this.#nothing.keys());
    for (const key of tensors.keys()) {
      if (!known.has(key)) throw new Error(`adapter ${name}: ${key} has no slot in this graph`);
    }
    for (const slot of this.#slots) this.#check(name, slot, tensors);
    this.#adapters.set(name, tensors);
    this.#mixes.clear();
  }

  /** Choose for runs from now on: a name, a mix {name: weight}, or null for the base alone. */
  use(selection) {
    const weights = typeof selection === "string" ? { [selection]: 1 } : (selection ?? {});
    for (const [name, weight] of Object.entries(weights)) {
      if (!this.#adapters.has(name)) {
        throw new Error(`adapter ${name}: not loaded, expected one of ${this.adapters.join(", ") || "none"}`);
      }
      if (!Number.isFinite(weight)) throw new Error(`adapter ${name}: weight ${weight} is no number`);
    }
    const key = JSON.stringify(Object.entries(weights).sort());
    if (!this.#mixes.has(key)) this.#mixes.set(key, this.#mixed(weights));
    this.#chosen = this.#mixes.get(key);
  }

  /** As ort.InferenceSession.run: the adapter in use goes into the slots. */
  run(feeds, ...rest) {
    const slots = Object.fromEntries(this.#chosen);
    return this.#session.run({ ...slots, ...feeds }, ...rest);
  }

  async release() {
    await this.#session.release?.();
  }

  #tensor(data, dims) {
    return new this.#ort.Tensor("float32", data, dims);
  }

  #check(name, slot, tensors) {
    const [a, b] = [tensors.get(slot.a), tensors.get(slot.b)];
    if (!a && !b) return;
    const rank = a?.dims[1];
    const fits = a && b && a.dims[0] === slot.inputs && b.dims[0] === rank && b.dims[1] === slot.outputs;
    if (!fits) {
      throw new Error(
        `adapter ${name}: ${slot.name} has ${a?.dims} and ${b?.dims}, ` +
          `expected (${slot.inputs}, r) and (r, ${slot.outputs})`,
      );
    }
  }

  /** Factors side by side along the rank, the weight in the second one: the sum of w B A, exactly. */
  #mixed(weights) {
    const chosen = new Map(this.#nothing);
    for (const slot of this.#slots) {
      const parts = Object.entries(weights)
        .filter(([name, weight]) => weight !== 0 && this.#adapters.get(name).has(slot.a))
        .map(([name, weight]) => [this.#adapters.get(name), weight]);
      if (!parts.length) continue;
      const rank = parts.reduce((sum, [tensors]) => sum + tensors.get(slot.a).dims[1], 0);
      const first = new Float32Array(slot.inputs * rank);
      const second = new Float32Array(rank * slot.outputs);
      let done = 0;
      for (const [tensors, weight] of parts) {
        const { data, dims } = tensors.get(slot.a);
        for (let row = 0; row < slot.inputs; row++) {
          first.set(data.subarray(row * dims[1], (row + 1) * dims[1]), row * rank + done);
        }
        const factor = Math.fround(weight);
        second.set(tensors.get(slot.b).data.map((value) => value * factor), done * slot.outputs);
        done += dims[1];
      }
      chosen.set(slot.a, this.#tensor(first, [slot.inputs, rank]));
      chosen.set(slot.b, this.#tensor(second, [rank, slot.outputs]));
    }
    return chosen;
  }
}

/**
 * Put a SlotSession in the place of a transformers.js model's own session, which is released.
 * `model` is what AutoModelForCausalLM.from_pretrained gives, or a pipeline's `.model`.
 */
export async function attach(model, session) {
  const own = model.sessions?.model;
  if (!own) throw new Error("model: no session named model, expected a decoder of transformers.js");
  session.config = own.config;
  model.sessions.model = session;
  await own.release?.();
  return model;
}

/** The most likely token, again and again: token ids beyond `ids`, until `eos` or the limit. */
export async function greedy(ort, session, ids, { maxNewTokens = 32, eos = [] } = {}) {
  const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const shapes = new Map((session.inputMetadata ?? []).map((value) => [value.name, value.shape]));
  let past = {};
  for (const name of session.inputNames.filter((n) => n.startsWith("past_key_values."))) {
    const shape = shapes.get(name);
    if (!shape) throw new Error(`input ${name}: its shape is not known, expected onnxruntime >= 1.21`);
    past[name] = new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
  }
  const found = [];
  let next = ids;
  while (found.length < maxNewTokens) {
    const length = ids.length + found.length;
    const feeds = { input_ids: int64(next), attention_mask: int64(Array(length).fill(1)), ...past };
    if (session.inputNames.includes("position_ids")) {
      feeds.position_ids = int64(next.map((_, i) => length - next.length + i));
    }
    const out = await session.run(feeds);
    const { data, dims } = out.logits;
    const row = data.subarray((dims[1] - 1) * dims[2], dims[1] * dims[2]);
    const token = row.reduce((best, value, i) => (value > row[best] ? i : best), 0);
    found.push(token);
    if (eos.includes(token)) break;
    next = [token];
    past = Object.fromEntries(
      Object.keys(past).map((name) => [name, out[name.replace("past_key_values.", "present.")]]),
    );
  }
  return found;
}
