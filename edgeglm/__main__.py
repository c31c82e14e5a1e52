"""``python -m edgeglm``: the command of that interpreter, wherever its scripts are."""

from edgeglm.cli.main import main

if __name__ == "__main__":
    main()
