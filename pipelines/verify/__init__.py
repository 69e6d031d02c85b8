"""Verification of everything that the other jobs have made."""
