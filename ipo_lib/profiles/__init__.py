"""Profiles: what a run works with, as data.

A profile is a file ``notebooks/profiles/<name>.yml``. ``settings`` says what it may hold,
``reading`` reads it, ``run`` opens its store, model and judge. No other module asks which profile
it works for.
"""
