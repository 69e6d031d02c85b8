"""Encoding: images to the noise that they would be sampled from."""
