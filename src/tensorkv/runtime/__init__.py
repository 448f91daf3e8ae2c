"""What tensorkv needs of a process: interrupts, forks, warnings, statistics."""
