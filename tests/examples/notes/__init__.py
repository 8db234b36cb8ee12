"""An application that uses clerkhooks as an extension: the README's tutorial."""
