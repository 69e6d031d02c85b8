"""Ingest, training and tracking on Ray: everything between the jobs and the mathematics of ddpm_core."""
