"""The values of one process: sums, update rules, optimizers."""
