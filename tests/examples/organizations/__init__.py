"""An application that stores Clerk's organizations and memberships in its own tables."""
