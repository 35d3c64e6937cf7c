"""`python -m outsize`: the command, where the folder of its script is not searched."""

from outsize.cli.main import main

if __name__ == "__main__":
    main()
