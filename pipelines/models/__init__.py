"""Models and checkpoints: how they are kept, and found by what a user calls them."""
