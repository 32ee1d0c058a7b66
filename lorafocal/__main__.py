"""`python -m lorafocal` is the `lorafocal` command."""

from lorafocal.cli import main

if __name__ == "__main__":
    main()
