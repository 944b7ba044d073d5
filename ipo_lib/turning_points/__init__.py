"""Where CSR turns (Eq. 2, 3): cheaper estimators than the paper's protocol, and their proof.

- ``draws``: what all of them share: traces, requests, draws; the terms are defined there.
- ``exhaustive``: the paper's protocol, isotonic smoothing, Pivotal Token Search, whole curves.
- ``wald``, ``adaptive``: sequential tests, and the search that is built on them.
- ``locate``: run searches on a model and a judge, many traces in step.
- ``curves``: run them on recorded curves, where S is known exactly.
- ``reliability``: how well a recorded curve knows its own turn.
- ``benchmark``, ``judge_errors``: compare with the truth; what a judge's errors do.
- ``mining``: learn cues and triggers from judged traces.
"""
