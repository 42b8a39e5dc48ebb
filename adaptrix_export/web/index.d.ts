import type { InferenceSession, Tensor, TensorConstructor, InferenceSessionFactory } from "onnxruntime-common";

/** onnxruntime-web, onnxruntime-node, or what they share. */
export interface Ort {
  InferenceSession: InferenceSessionFactory;
  Tensor: TensorConstructor;
}

export type Source = string | URL | ArrayBuffer | Uint8Array;

/** A name, a weighted mix, or null for the base alone. */
export type Selection = string | Record<string, number> | null;

export interface ArtifactSource {
  /** onnx/model.onnx of a switchable artifact. */
  model: Source;
  /** onnx/model.onnx_data; not needed where the weights are inside of the graph file. */
  data?: Source;
  /** The name by which the graph knows its data; model.onnx_data. */
  dataName?: string;
}

export declare class SlotSession {
  static create(
    ort: Ort,
    source: ArtifactSource,
    options?: InferenceSession.SessionOptions,
  ): Promise<SlotSession>;
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly InferenceSession.ValueMetadata[] | undefined;
  readonly outputMetadata: readonly InferenceSession.ValueMetadata[] | undefined;
  readonly adapters: string[];
  /** Throws for an adapter of another graph, without a slot, or of another shape. */
  load(name: string, content: ArrayBuffer | Uint8Array): void;
  /** Throws for a name that is not loaded and a weight that is no number. */
  use(selection: Selection): void;
  run(
    feeds: InferenceSession.FeedsType,
    options?: InferenceSession.RunOptions,
  ): Promise<InferenceSession.ReturnType>;
  release(): Promise<void>;
}

export declare function attach<M>(model: M, session: SlotSession): Promise<M>;

export declare function greedy(
  ort: Ort,
  session: SlotSession | InferenceSession,
  ids: number[],
  options?: { maxNewTokens?: number; eos?: number[] },
): Promise<number[]>;

export declare function bytesOf(source: Source): Promise<Uint8Array>;

export declare function readSafetensors(content: ArrayBuffer | Uint8Array): {
  metadata: Record<string, string>;
  tensors: Map<string, { dims: number[]; data: Float32Array }>;
};
