"""Small applications in common styles, which behave the same with and without clerkhooks."""
