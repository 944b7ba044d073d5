"""The command ``ipo``.

``app`` holds its subcommands. ``reproduce`` runs notebooks, ``arguments`` reads what was asked for,
``cost`` says what a run would generate, ``doctor`` and ``rehearsal`` check the machine, ``train``
trains both stages, ``report`` writes the page at the end of a run, ``explorer`` the page of traces,
``findings`` and ``pages`` the numbers of the project's pages.
"""
