"""A rewritten file, and the proof that it computes what the file before did."""
