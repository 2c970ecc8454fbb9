"""`python -m launch COMMAND`, the same as `freespec COMMAND`."""

from launch.cli.console import main

if __name__ == "__main__":
    main()
