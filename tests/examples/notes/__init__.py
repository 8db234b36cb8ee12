"""An application that uses clerkhooks as an extension: docs/tutorials/application.md."""
