"""What every run of a program shares: flags and messages, work folder, progress."""
