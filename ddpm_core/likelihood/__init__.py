"""Bounds on and values of an image's likelihood, in bits per dimension, and how sure their means are."""
