"""Traces to walk through: one page of HTML, with what the store holds of them.

``stored`` reads traces, their continuations and what was made of them from the store. ``page``
writes them into one file that needs neither a server nor a network.
"""
