"""What a run does every so many steps: one file for each."""
