"""What every command shares: configuration, paths as a user writes them, console, exit codes."""
