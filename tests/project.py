"""The packages of the project, and the folder of benchmarks beside them."""

PACKAGES = ("modeling", "data_prep", "eval", "training")
WITH_COMMANDS = (*PACKAGES, "benchmarks")
