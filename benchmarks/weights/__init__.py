"""Weights that one process publishes and others read, beside files, Ray's objects and Redis."""
