"""Readers of published SAEs, each by the layout of its repository (docs/formats.md)."""
