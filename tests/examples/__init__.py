"""Examples to copy: applications that use clerkhooks, a script and alert rules."""
