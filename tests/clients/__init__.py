"""Real clients judge our files: transformers and Megatron-core, on CPU, with tiny random models.

The harness, for tests in this folder (each test module states ``pytestmark = pytest.mark.clients("transformers", …)``):

- `hf_models.make(case, out, …)` writes a genuine Hugging Face checkpoint; `hf_models.CASES` names them;
- `hf_logits.logits(folder)` loads one with transformers, every key accounted for, and runs it;
- fixture ``mcore`` (`mcore.Megatron`): ``mcore.logits(folder, tp=…, pp=…, vpp=…)`` does the same with the real
  ``megatron.core`` GPTModel, built from the checkpoint's own ``args``, one process per rank;
- fixture ``hf_case``: ``hf_case("llama", …)`` is the folder of that case, made once per session.

Nothing here imports a client at import time, so collection works where none is installed.
"""
