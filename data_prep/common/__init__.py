"""What all packages share: command lines, files, locks, the Hub."""
