"""What all commands share: flags, help, exit codes, lines on the terminal."""
