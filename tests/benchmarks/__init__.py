"""Benchmarks to run by hand. Each prints a table; no test asserts a duration."""
