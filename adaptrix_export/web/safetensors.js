// Reads safetensors: 8 bytes of length, a JSON header, then the bytes of the tensors.

/**
 * @param {ArrayBuffer | Uint8Array} content
 * @returns {{ metadata: Record<string, string>, tensors: Map<string, { dims: number[], data: Float32Array }> }}
 */
export function readSafetensors(content) {
  const bytes = content instanceof Uint8Array ? content : new Uint8Array(content);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 8) throw new Error(`adapter file: ${bytes.length} bytes, expected safetensors`);
  const length = Number(view.getBigUint64(0, true));
  if (8 + length > bytes.length) {
    throw new Error(`adapter file: a header of ${length} bytes in a file of ${bytes.length}`);
  }
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const { __metadata__: metadata = {}, ...entries } = header;
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    const count = shape.reduce((product, size) => product * size, 1);
    if (dtype !== "F32" || end - begin !== 4 * count || 8 + length + end > bytes.length) {
      throw new Error(`adapter file: ${name} is ${dtype} of ${end - begin} bytes, expected F32 of ${4 * count}`);
    }
    // A copy: what lies in the file need not be aligned to four bytes, and a Buffer of node is a view.
    const start = bytes.byteOffset + 8 + length + begin;
    const data = new Float32Array(bytes.buffer.slice(start, start + 4 * count));
    tensors.set(name, { dims: shape, data });
  }
  return { metadata, tensors };
}
