"""Tracking: a spool file, sent to MLflow in the background."""
