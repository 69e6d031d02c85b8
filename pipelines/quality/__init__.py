"""Quality: how close one set of images is to another."""
