"""The command, as `python -m tracefl`."""

from tracefl.cli import main

if __name__ == "__main__":
    main()
