"""Benchmarks beside other projects. Not part of the product."""
