"""An application that keeps Clerk's organizations and memberships in tables of its own."""
