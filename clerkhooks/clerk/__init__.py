"""What Clerk and Svix define: signatures, events, session tokens, and Clerk's APIs."""
