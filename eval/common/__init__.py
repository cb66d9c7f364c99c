"""Devices, models and scores."""
