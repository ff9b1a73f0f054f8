"""What a step takes and costs before it runs: memory, time, hours, disk."""
