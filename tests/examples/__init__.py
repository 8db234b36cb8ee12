"""Examples to copy: a script, alert rules, and applications that use clerkhooks."""
