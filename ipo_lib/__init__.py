"""Intervened Preference Optimization (arXiv 2509.24393) as a thin library under notebooks. One module per noun of the paper;
``stages`` holds the verbs. Importing the package loads no torch."""

__version__ = "0.1.0"
