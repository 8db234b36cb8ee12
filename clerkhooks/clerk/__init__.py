"""What Clerk and Svix define: signatures, events and session tokens, free of Flask and of the database."""
