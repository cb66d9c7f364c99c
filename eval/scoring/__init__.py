"""Scoring of multiple-choice answers."""
