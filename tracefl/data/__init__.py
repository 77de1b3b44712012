"""From the name of a dataset to one file of examples per client."""
