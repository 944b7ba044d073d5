"""The ``ipo`` command as ``python -m ipo_lib.cli``, for ``accelerate launch -m``."""

from ipo_lib.cli.app import main

if __name__ == "__main__":
    main()
