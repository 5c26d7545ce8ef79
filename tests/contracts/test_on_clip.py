"""Every method for images alone learns on the image tower of a CLIP model, too: B 7, N 17, D 48, H 3, L 3, F 24."""

import pytest
import torch

from lamina.backbones.clip import ClipImageTower
from lamina.model import Batch
from lamina.registry import default_backbone, method_class, method_names
from tests.backbones.clips import clip
from tests.contracts.test_methods import BRIEF, PER_TASK, TASKS, cheap
from tests.streams import blobs, trainer_of


@pytest.mark.parametrize(
    "name", [name for name in method_names() if "clip" not in default_backbone(method_class(name))]
)
def test_two_tasks_are_learned_and_an_answer_is_the_same_alone_and_in_a_batch(name):
    settings = cheap(name, **BRIEF, components=3, position="none")  # of CLIP's class token none reaches block 0
    trainer = trainer_of(settings, ClipImageTower(clip()))
    before = {key: value.clone() for key, value in trainer.learner.model.state_dict().items()}
    stream = blobs(TASKS, PER_TASK)
    trainer.run(stream)
    model = trainer.learner.model.eval()
    after, learned = model.state_dict(), model.learned()
    held = {key: value for key, value in before.items() if key.startswith("tower.") and key not in learned}
    assert all(torch.equal(value, after[key]) for key, value in held.items())
    assert held or model.tower.learned
    batch = next(iter(trainer.feed.plain(stream.tasks[0].test)))._replace(labels=None)
    with torch.no_grad():
        together = model(batch).logits
        alone = [
            model(Batch(*(part if part is None else part[i : i + 1] for part in batch))) for i in range(len(together))
        ]
    assert together.shape[1] == TASKS * PER_TASK and len(together) > 1
    apart = torch.cat([output.logits for output in alone])
    assert (together - apart).abs().max() <= 1e-4 * together.abs().max()
