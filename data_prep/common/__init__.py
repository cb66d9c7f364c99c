"""Shared by all packages: command lines, files, locks, schemas, the Hub."""
