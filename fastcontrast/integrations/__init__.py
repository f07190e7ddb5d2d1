"""Frameworks' models on the operations: each module here imports its framework, and is imported by name."""
