"""The server's side of dist_async; no Ray in it."""
