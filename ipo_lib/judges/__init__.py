"""Judges that ask a model or match phrases, and their measurement against people's labels."""
