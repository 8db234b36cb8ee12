"""Benchmarks that are run manually. Each prints a table; no test asserts a duration."""
