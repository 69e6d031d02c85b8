"""The evaluation job."""
