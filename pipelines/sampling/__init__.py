"""The sampling job."""
