"""Texts with learned words, read by open_clip itself: what shared parts are compared with."""

import functools

from torch.nn import functional as F

from tests.backbones.clips import clip, ids


@functools.cache
def _model():
    return clip().requires_grad_(False)


def text_by_hand(text, context, first=1):
    """What the text tower says of one text in which a context (n, W) stands from row `first` on: (F,), of length 1."""
    model, tokens = _model(), ids(text)
    words = model.token_embedding(tokens).clone()
    words[0, first : first + len(context)] = context
    rows = model.transformer(words + model.positional_embedding, attn_mask=model.attn_mask)
    return F.normalize(model.ln_final(rows)[0, tokens[0].argmax()] @ model.text_projection, dim=-1)
