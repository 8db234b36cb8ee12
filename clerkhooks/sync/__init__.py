"""Reconciliation with Clerk's Backend API."""
