"""Benchmarks of tensorkv beside its peers; run as ``python -m benchmarks local|sync|servers``."""
