"""Checks that every part must pass; a part in an `experiment.py` passes the same ones."""
