"""`python -m everett_cuda` is the `everett` command."""

from .cli import main

if __name__ == "__main__":
    main()
