"""How each algorithm turns samples into gradients: sampler, reward and loss, composed."""

from __future__ import annotations

from rftcore.training.methods.ddpo import Ddpo
from rftcore.training.methods.dpok import Dpok
from rftcore.training.methods.draft_lv import DraftLv
from rftcore.training.methods.draft_plus import DraftPlus
from rftcore.training.methods.method import Method, Update
from rftcore.training.methods.regression import Rwr, Sft
from rftcore.training.methods.reward_gradient import Alignprop, Draft, Drtune, Refl

__all__ = ["METHODS", "Method", "Update"]

METHODS: dict[str, type[Method]] = {
    "draft": Draft,
    "draft_lv": DraftLv,
    "draft_plus": DraftPlus,
    "alignprop": Alignprop,
    "refl": Refl,
    "drtune": Drtune,
    "ddpo": Ddpo,
    "dpok": Dpok,
    "rwr": Rwr,
    "sft": Sft,
}
