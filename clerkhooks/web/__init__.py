"""The HTTP layer: webhooks, sessions, health, metrics, problems and logs."""
