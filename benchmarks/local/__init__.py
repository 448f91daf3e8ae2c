"""One process: push and pull of a local store beside MXNet, PyTorch, NumPy and the limit of the memory."""
