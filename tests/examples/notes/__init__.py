"""An application of its own that uses clerkhooks as an extension: the README's tutorial."""
