"""The tests. Every signature, token and database in them is real."""
