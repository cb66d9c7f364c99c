"""Contenders in turns; not part of the product."""
