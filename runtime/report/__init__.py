"""Validation reports as HTML and JUnit."""
