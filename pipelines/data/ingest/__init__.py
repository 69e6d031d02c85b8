"""From a source of images to a prepared data set: sources, formats, decoding, the account of what was left out."""
