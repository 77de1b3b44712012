"""TraceFL as a Flower app; the code is in the installed package."""
