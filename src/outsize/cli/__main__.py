"""`python -m outsize.cli`: the command line, as `python -m outsize`."""

from outsize.cli.main import main

if __name__ == "__main__":
    main()
