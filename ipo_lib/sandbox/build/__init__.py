"""What only maintainers run: train the sandbox's organisms, measure them, record their files."""
