"""Small applications in common styles. Each behaves the same with and without clerkhooks."""
