"""An application that stores Clerk's subscriptions in its own table."""
