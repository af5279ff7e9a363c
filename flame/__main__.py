"""``python -m flame``: the `flame` command."""

from flame.cli.main import main

if __name__ == "__main__":
    main()
