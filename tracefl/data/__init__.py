"""From a named dataset to one file of examples per client."""
