"""Example applications that use clerkhooks, each a package to copy."""
