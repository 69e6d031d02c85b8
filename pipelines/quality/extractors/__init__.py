"""Feature extractors: from images to the numbers of which distributions are compared."""
