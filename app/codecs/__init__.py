"""Bytes ⇄ arrays. Knows formats, knows no model."""
