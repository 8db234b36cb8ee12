"""Small applications in common styles; each behaves with clerkhooks as it does without."""
