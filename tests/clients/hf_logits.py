"""Logits from transformers, with every key of the checkpoint accounted for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["logits", "token_ids"]


def token_ids(vocab: int, length: int = 24, batch: int = 2) -> torch.Tensor:
    """Fixed token ids ``[batch, length]`` below ``vocab``; the same call gives the same ids."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(1234))


def logits(folder: Path, ids: torch.Tensor | None = None, *, dtype: str = "float32") -> torch.Tensor:
    """Load a checkpoint with transformers and run it.

    Parameters
    ----------
    folder
        A Hugging Face checkpoint.
    ids
        Token ids; `token_ids` of the model's vocabulary by default.
    dtype
        What the weights are cast to before they are used. The default lets a checkpoint in any dtype be compared with one
        that holds the same values.

    Returns
    -------
    torch.Tensor
        float32 logits ``[batch, length, vocab]``.

    Raises
    ------
    AssertionError
        A tensor is missing, unexpected or of the wrong shape.
    """
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, attn_implementation="eager"
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    assert not wrong, f"transformers does not accept the tensors of {folder}: {wrong}"
    ids = token_ids(model.config.vocab_size) if ids is None else ids
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()
