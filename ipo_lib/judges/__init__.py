"""Judges, and how they agree with people.

- ``rubric``: a language model behind a server, asked with a rubric.
- ``guards``: guard models, in this process or behind a server.
- ``phrases``: refusal phrases, without a model.
- ``people``: judges against labels that people gave.

A judge follows the protocol ``ipo_lib.judging.Judge``, and a profile names it as ``module:name``.
What a judge is asked lies in the YAML files beside the code.
"""
