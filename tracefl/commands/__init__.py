"""What the commands of `tracefl` answer, as plain dicts, and how a terminal shows it; see `cli`."""
