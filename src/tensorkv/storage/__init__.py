"""Files: the write-ahead log, snapshots, checkpoints."""
