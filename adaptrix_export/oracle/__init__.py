"""PyTorch and PEFT on the original files: what artifacts are compared with."""
