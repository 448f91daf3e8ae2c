"""Releases: what changed between two versions of values, and digests that tell versions apart."""
