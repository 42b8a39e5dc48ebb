// node switching.mjs REQUEST.json ANSWER.json: greedy tokens of every selection in the request.
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";

const [request, answer] = process.argv.slice(2);
const asked = JSON.parse(await readFile(request, "utf8"));
const require = createRequire(asked.modules);
const ort = require(asked.runtime);
const { SlotSession, greedy } = await import(asked.web);

const read = (name) => readFile(`${asked.artifact}/${name}`);
const session = await SlotSession.create(ort, {
  model: new Uint8Array(await read("onnx/model.onnx")),
  data: new Uint8Array(await read("onnx/model.onnx_data")),
});
const told = { inputs: session.inputNames, tokens: [], errors: [] };
for (const name of asked.adapters) session.load(name, await read(`adapters/${name}.safetensors`));
for (const selection of asked.selections) {
  session.use(selection);
  told.tokens.push(await greedy(ort, session, asked.ids, { maxNewTokens: asked.steps }));
}
for (const selection of asked.refused) {
  try {
    session.use(selection);
    told.errors.push(null);
  } catch (error) {
    told.errors.push(error.message);
  }
}
await writeFile(answer, JSON.stringify(told));
