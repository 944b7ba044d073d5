"""The ``ipo`` command: ``app`` holds its commands, each in a few lines."""
