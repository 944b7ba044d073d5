"""The paper's tables and figures, and what they are compared with.

- ``findings`` (Figs 3 to 5a), ``cue_effects`` (Fig 5b), ``replacements`` (Fig 6), ``kl`` (Fig 7)
- ``recipes`` (ways to train), with ``pair_sources``, ``detectors`` (Table 3) and ``grpo`` (Table 1)
- ``states``: a probe for S in the model's hidden states, and a cue detector of it
- ``study`` (full runs of tables), ``study_cells``, ``results``, ``claim_rule``, ``learned``
- ``paper`` (the numbers as reported), ``judge_robustness``
"""
