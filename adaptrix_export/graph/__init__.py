"""ONNX graphs whose weights are expressions over the base's tensors."""
