"""Parameter servers: ``dist_async`` beside MXNet; durability, growth, readers, recovery."""
