"""`python -m qframe` is the command `qframe`."""

from qframe.cli import main

if __name__ == "__main__":
    main()
