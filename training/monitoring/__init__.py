"""Metrics, records and trackers of a run."""
