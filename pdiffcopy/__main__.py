"""Enable ``python -m pdiffcopy``."""

from pdiffcopy.cli import main

if __name__ == "__main__":
    main()
