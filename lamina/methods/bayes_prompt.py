"""Bayesian prompt learning: the words around the name of a class are a distribution, and predictions are means over it.

To every word of one learned context the same random residual is added. Its mean and variance are learned, or given by
the image (`conditional`); a small loss holds them near N(0, 1). Comparisons of CLIP methods call it VPT, for
variational prompt tuning; it has no prompts in the image tower.

The released code starts with a spread fifty times that of words and more (`start="paper"`), here it is 0.02, that of
words in CLIP. The paper's bound on the likelihood is the mean of logarithms (`bound="elbo"`), the code's and ours the
logarithm of the mean, which is tighter. Passes and batches are those of continual learning with CoOp.

Shared parts, in reading order:
    contexts            lamina.heads.bayes.SampledTexts
    classifier          lamina.heads.bayes.SampledTextHead
    plan of training    lamina.methods.by_name.ByName

References:
    Derakhshani et al., Bayesian Prompt Learning for Image-Language Model Generalization, ICCV 2023; the authors'
    repository saic-fi/Bayesian-Prompt-Learning. Jha et al., CLAP4CLIP, NeurIPS 2024: its continual use.
"""

from __future__ import annotations

from pydantic import Field

from lamina.backbones.tower import Tower
from lamina.heads.bayes import Bound, Predict, SampledTextHead, SampledTexts, Start
from lamina.heads.texts import text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel
from lamina.prompts.contexts import len_of


class BayesPrompt(ByName):
    """Settings; samples, words and the weight of the divergence are the paper's."""

    words: str = Field("a photo of a", description="that the context starts from; empty draws it")
    length: int = Field(4, ge=1, description="learned words in a context (n) that is drawn")
    samples: int = Field(10, ge=1, description="draws of the context in a step, and for a prediction (S)")
    predict: Predict = Field("samples", description="by the mean over draws, fixed by the seed, or by the mean context")
    conditional: bool = Field(False, description="let the distribution depend on the image; each has texts of its own")
    start: Start = Field("tokens", description="the spread to begin with: that of words, or the released code's")
    bound: Bound = Field("mixture", description="the loss: of the mean over draws, or averaged over draws")
    divergence: float = Field(0.001, ge=0, description="weight of the divergence of the distribution from N(0, 1)")

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.words:
            idle["length"] = "where words are given, which say how many there are"
        if self.samples == 1:
            idle["bound"] = "with samples=1, where both are the same"
        return idle

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or its texts no room for so many learned words.
        """
        side = text_side(tower, "bayes-prompt")
        texts = SampledTexts(
            side,
            len_of(side, self.words) if self.words else self.length,
            words=self.words,
            samples=self.samples,
            predict=self.predict,
            conditional=self.conditional,
            start=self.start,
            divergence=self.divergence,
            names=self.names,
        )
        head = SampledTextHead(texts, bound=self.bound, negatives=self.competing)
        return self.learner(PromptedModel(tower, None, head), cache="features")
