"""What a person sees and keeps: log lines, progress, tables, plots."""
