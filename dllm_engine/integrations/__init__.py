"""dllm-engine inside other libraries. Each module is an extra (``dllm-engine[lm-eval]``, ``[ray]``, ``[serve]``) and
imports its library only when it is used."""
