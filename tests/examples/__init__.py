"""Worked examples of applications that are built on clerkhooks, each a package to copy."""
