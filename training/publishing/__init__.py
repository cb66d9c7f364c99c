"""Uploads to the Hub."""
