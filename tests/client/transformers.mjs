// node transformers.mjs FOLDER NODE_MODULES NAME...: transformers.js on our folders, a JSON line a row.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, modules, ...names] = process.argv.slice(2);
const require = createRequire(`${modules}/package.json`);
const place = require.resolve("@huggingface/transformers");
const library = await import(pathToFileURL(place).href);
const { env, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification } =
  library;
const { AutoModelForImageClassification, AutoTokenizer, Tensor, pipeline } = library;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = `${folder}/`;
const expected = JSON.parse(await readFile(`${folder}/expected.json`, "utf8"));

const greedy = { max_new_tokens: expected.new, min_new_tokens: expected.new, do_sample: false };
const numbers = (tensor) => Array.from(tensor.data, Number);
const equal = (one, other) => {
  if (JSON.stringify(one) !== JSON.stringify(other)) throw new Error(`${one}, expected ${other}`);
};
const close = (one, other, bound = 1e-4) => {
  const apart = Math.max(...one.map((value, place) => Math.abs(value - other[place])));
  if (!(apart <= bound)) throw new Error(`${apart} apart`);
  return `at most ${apart.toExponential(1)} apart`;
};

const rows = {
  async causal() {
    const model = await AutoModelForCausalLM.from_pretrained("decoder");
    const tokenizer = await AutoTokenizer.from_pretrained("decoder");
    for (const [place, text] of expected.texts.entries()) {
      const row = expected.decoder.rows[place];
      const encoded = tokenizer(text);
      equal(numbers(encoded.input_ids), row);
      const answer = await model.generate({ ...encoded, ...greedy });
      equal(numbers(answer).slice(row.length), expected.decoder.tokens[place]);
    }
    return "two prompts, greedy tokens equal";
  },
  async batch() {
    const model = await AutoModelForCausalLM.from_pretrained("decoder");
    const tokenizer = await AutoTokenizer.from_pretrained("decoder");
    tokenizer.padding_side = "left";
    const encoded = tokenizer(expected.texts, { padding: true });
    const length = encoded.input_ids.dims[1];
    const answer = await model.generate({ ...encoded, ...greedy });
    equal(answer.tolist().map((row) => row.slice(length).map(Number)), expected.decoder.tokens);
    return "a left-padded batch, greedy tokens equal";
  },
  async chat() {
    const model = await AutoModelForCausalLM.from_pretrained("decoder");
    const tokenizer = await AutoTokenizer.from_pretrained("decoder");
    const encoded = tokenizer.apply_chat_template(expected.chat, {
      add_generation_prompt: true,
      return_dict: true,
    });
    equal(numbers(encoded.input_ids), expected.decoder.chat);
    const answer = await model.generate({ ...encoded, ...greedy });
    equal(numbers(answer).slice(expected.decoder.chat.length), expected.decoder.chat_tokens);
    return "its chat template, greedy tokens equal";
  },
  async features() {
    const embed = await pipeline("feature-extraction", "sentence");
    const apart = [];
    for (const [place, text] of expected.sentences.entries()) {
      const vector = await embed(text, { pooling: "mean", normalize: true });
      apart.push(close(numbers(vector), expected.sentence.vectors[place]));
    }
    return apart[0];
  },
  async classifier() {
    const model = await AutoModelForSequenceClassification.from_pretrained("classifier");
    const tokenizer = await AutoTokenizer.from_pretrained("classifier");
    const said = [];
    for (const [place, text] of expected.texts.entries()) {
      const { logits } = await model(tokenizer(text));
      said.push(close(numbers(logits), expected.classifier.logits[place]));
    }
    return said[0];
  },
  async seq2seq() {
    const model = await AutoModelForSeq2SeqLM.from_pretrained("seq2seq");
    const row = expected.seq2seq.row;
    const input_ids = new Tensor("int64", row.map(BigInt), [1, row.length]);
    const attention_mask = new Tensor("int64", row.map(() => 1n), [1, row.length]);
    const answer = await model.generate({ input_ids, attention_mask, ...greedy });
    equal(numbers(answer), expected.seq2seq.tokens);
    return "greedy tokens equal";
  },
  async image() {
    const model = await AutoModelForImageClassification.from_pretrained("image");
    const pixels = expected.image.pixels.flat(3);
    const { logits } = await model({
      pixel_values: new Tensor("float32", Float32Array.from(pixels), [1, 3, 32, 32]),
    });
    return close(numbers(logits), expected.image.logits);
  },
};

for (const name of names.length ? names : Object.keys(rows)) {
  try {
    console.log(JSON.stringify({ row: name, passed: true, detail: await rows[name]() }));
  } catch (error) {
    const detail = String(error).slice(0, 300);
    console.log(JSON.stringify({ row: name, passed: false, detail }));
    process.exitCode = 1;
  }
}
