"""The command line, which runs as ``clerkhooks`` or as ``python -m clerkhooks``."""
