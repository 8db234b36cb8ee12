"""The command line: ``clerkhooks``, also as ``python -m clerkhooks``."""
