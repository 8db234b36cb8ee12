"""
Tables of organizations and memberships, fed from Clerk's events.

Copy this package beside ``clerkhooks/``, its migration into ``migrations/versions/``, and call ``connect()`` in ``wsgi.py``.
"""

from tests.examples.organizations.models import Organization, OrganizationMembership
from tests.examples.organizations.receivers import connect

__all__ = ["Organization", "OrganizationMembership", "connect"]
