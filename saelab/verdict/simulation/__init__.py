"""Simulated studies that check what the verdict promises (`saelab verdict --simulate`)."""
