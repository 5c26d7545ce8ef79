"""ProDA: many contexts at once; what they say of a class is taken for a Gaussian, whose mean classifies.

Contexts differ in where the name of the class stands. Each step of training moves a few of them, by an upper bound of
the loss that features drawn from the Gaussians would have; another loss keeps contexts from saying the same.
Predictions take the mean over all contexts, so they cost what CoOp's do.

The released code shows each batch of images to several samples of contexts, one after the other, which together are all
of them; here each step has images of its own and draws its contexts anew. Contexts, rate and batches are the authors'
for few images, passes those of continual learning with CoOp.

Shared parts, in reading order:
    contexts            lamina.heads.several.SeveralTexts
    classifier          lamina.heads.several.SurrogateHead
    plan of training    lamina.methods.by_name.ByName

References:
    Lu et al., Prompt Distribution Learning, CVPR 2022, section 3; released code as used again in bhrqw/AttriCLIP.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lamina.backbones.tower import Tower
from lamina.heads.several import SeveralTexts, SurrogateHead, check_each_step
from lamina.heads.texts import text_side
from lamina.learner import Learner
from lamina.methods.by_name import ByName
from lamina.model import PromptedModel


class ProDA(ByName):
    """Settings; contexts and rate are the released code's."""

    contexts: int = Field(32, ge=1, description="contexts for all classes (K)")
    length: int = Field(16, ge=1, description="learned words in a context (n)")
    position: Literal["mixed", "end", "middle", "front"] = Field(
        "mixed",
        description="of the class name: behind, amid or before the context; mixed has half, a quarter and a quarter",
    )
    each_step: int = Field(4, ge=1, description="contexts that one step draws and moves")
    apart: float = Field(0.1, ge=0, description="weight of the loss that keeps contexts from saying the same")
    batch_size: int = Field(20, ge=1, description="images in one step, over all devices")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")

    @model_validator(mode="after")
    def _step_is_possible(self) -> Self:
        check_each_step(self.each_step, self.contexts)
        return self

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.contexts == 1:
            idle["apart"] = "with contexts=1, where there is no pair of them"
        return idle

    def build(self, tower: Tower) -> Learner:
        """Put the method together for one frozen image tower.

        Raises:
            ConfigError: when it has no text side, or its texts no room for so many learned words.
        """
        texts = SeveralTexts(
            text_side(tower, "proda"),
            self.contexts,
            self.length,
            position=self.position,
            apart=self.apart,
            names=self.names,
        )
        head = SurrogateHead(texts, each_step=self.each_step, negatives=self.competing)
        return self.learner(PromptedModel(tower, None, head), cache="features")
