"""Train a model whose parameters a store updates."""
