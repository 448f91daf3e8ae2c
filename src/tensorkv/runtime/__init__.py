"""What tensorkv needs of a process: interrupts, forks, compiled parts, statistics."""
