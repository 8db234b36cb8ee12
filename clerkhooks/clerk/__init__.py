"""Interfaces of Clerk and Svix: signatures, events, session tokens, and Clerk's APIs."""
