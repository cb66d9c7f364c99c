"""The packages of the project."""

PACKAGES = ("modeling", "data_prep", "eval", "training")
