"""What all benchmarks share: works and their right results, processes, turns, reports."""
