"""`python -m adaptrix_export` is `adaptrix-export`."""

from adaptrix_export.cli import main

if __name__ == "__main__":
    main(prog_name="adaptrix-export")
