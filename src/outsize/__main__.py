"""`python -m outsize`: the command line."""

from outsize.cli.main import main

if __name__ == "__main__":
    main()
