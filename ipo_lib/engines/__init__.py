"""What runs models, in this process and behind servers.

Sampling:

- ``transformers_sampler``: a model in this process; ``decoding`` draws many rows at once and reads
  shared prefixes once, ``nucleus`` is top-p, ``draws`` one request while it is sampled.
- ``lanes``: the same on two cores of a CPU. ``captured``: the same on a GPU, where a step is a CUDA
  graph (``graphs``).
- ``loading``: models and adapters from folders, whole and without their code.
- ``scoring``: probabilities of given tokens.

Servers:

- ``vllm``: a model behind a vLLM server; ``openai_api``: any OpenAI-compatible server.
- ``server_policy``: what a failure means; ``replies``: what was answered; ``budget``: what may be
  spent.

Training:

- ``lora``: the frozen base model and its adapter.
- ``prefix_sharing``, ``trees``: DPO that reads a shared prefix once; ``trl_trainer``: stock TRL.
- ``processes``: several processes of one training.

Also ``memory`` (which models lie on a GPU), ``hub`` (downloads) and ``progress`` (progress bars).
"""
