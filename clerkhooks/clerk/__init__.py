"""The interfaces to Clerk and Svix: signatures, events, session tokens, and Clerk's APIs."""
