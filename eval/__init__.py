"""Evaluation of a model: loss, benchmarks, samples and reports."""
