// The little of protobuf that is needed to take the defaults off a graph's slots.
//
// A slot is an input with a default, an empty matrix. ONNX Runtime's JavaScript offers no input that
// has a default, so here it becomes an input like any other: its initializer is left out.

const [GRAPH, METADATA] = [7, 14]; // fields of ModelProto
const INITIALIZER = 5; // of GraphProto
const TENSOR_NAME = 8; // of TensorProto
const BYTES = 2; // a wire type
const FACTS = "adaptrix";

/** Every field of a message: its number, wire type, and where it and its content begin and end. */
function* fields(bytes, start, end) {
  let at = start;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      if (at >= end) throw new Error("graph: ended in the middle of a field");
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < end) {
    const from = at;
    const tag = varint();
    const wire = tag % 8;
    let content = at;
    if (wire === 0) varint();
    else if (wire === 1) at += 8;
    else if (wire === 5) at += 4;
    else if (wire === BYTES) {
      const length = varint();
      content = at;
      at += length;
    } else throw new Error(`graph: wire type ${wire} of protobuf`);
    if (at > end) throw new Error("graph: a field reaches beyond its message");
    yield { number: Math.floor(tag / 8), wire, from, content, to: at };
  }
}

function text(bytes, field) {
  return new TextDecoder().decode(bytes.subarray(field.content, field.to));
}

function encodeVarint(value) {
  const out = [];
  for (; value > 127; value = Math.floor(value / 128)) out.push((value % 128) + 128);
  return Uint8Array.from([...out, value]);
}

function join(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** What the graph says of itself: its slots and the stamp that its adapters carry. */
export function readFacts(bytes) {
  for (const field of fields(bytes, 0, bytes.length)) {
    if (field.number !== METADATA) continue;
    const pair = {};
    for (const part of fields(bytes, field.content, field.to)) pair[part.number] = text(bytes, part);
    if (pair[1] === FACTS) return JSON.parse(pair[2]);
  }
  return {};
}

/** The graph without the initializers of these names. */
export function withoutInitializers(bytes, names) {
  const parts = [];
  let removed = 0;
  for (const field of fields(bytes, 0, bytes.length)) {
    if (field.number !== GRAPH || field.wire !== BYTES) {
      parts.push(bytes.subarray(field.from, field.to));
      continue;
    }
    const kept = [];
    for (const inner of fields(bytes, field.content, field.to)) {
      if (inner.number === INITIALIZER && names.has(tensorName(bytes, inner))) removed += 1;
      else kept.push(bytes.subarray(inner.from, inner.to));
    }
    const graph = join(kept);
    parts.push(encodeVarint(GRAPH * 8 + BYTES), encodeVarint(graph.length), graph);
  }
  if (removed !== names.size) {
    throw new Error(`graph: ${removed} slots have a default, expected ${names.size}`);
  }
  return join(parts);
}

function tensorName(bytes, field) {
  for (const part of fields(bytes, field.content, field.to)) {
    if (part.number === TENSOR_NAME) return text(bytes, part);
  }
  return "";
}
