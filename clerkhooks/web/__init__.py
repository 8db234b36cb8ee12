"""HTTP in and out: webhooks, sessions, health, metrics, problems and logs."""
