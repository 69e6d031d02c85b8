"""Trainings of every combination of some fields' values, as one job."""
