"""Local directories and object stores under one name, with atomic writes and errors in one line."""
