"""Small applications as people write them: each behaves with clerkhooks as it does without."""
