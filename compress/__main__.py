"""`python -m compress`: the same command where another program on the path is called `compress`."""

from compress.cli.main import main

if __name__ == "__main__":
    main()
