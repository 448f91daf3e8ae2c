"""The worker's side of dist_async."""
