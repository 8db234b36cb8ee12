"""Benchmarks: run by hand, each prints a table; no test asserts a time."""
