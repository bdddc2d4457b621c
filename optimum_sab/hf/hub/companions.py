"""What is written beside the weights of a packed model: its card, its processor, and the file that loads it.

`save_pretrained` asks the quantizer once, before it writes (`SABHfQuantizer.get_state_dict_and_metadata`), and has
noted by then which files were in the folder. So what is written now is uploaded with the rest. `push_to_hub` saves to a
folder of its own and puts there, last of all, the card that `create_and_tag_model_card` gave it: `install` wraps that
function, so that the card of a packed model is the one that its folder has.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel, modeling_utils
from transformers.utils import hub
from yaml import YAMLError

from optimum_sab.errors import warn
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.hub.authorship import CARD, is_users, keeps, sign, with_tags
from optimum_sab.hf.hub.card import model_card, named
from optimum_sab.hf.hub.facts import model_facts
from optimum_sab.hf.hub.processor_files import ProcessorSource, write_processor
from optimum_sab.hf.hub.remote_code import write_remote_code
from optimum_sab.hf.running_call import running_call
from optimum_sab.nn.linear import SABLinear


def write_companions(model: Any, config: SABConfig, processor: ProcessorSource) -> None:
    """Write them into the folder of the `save_pretrained` that is running; nothing where none is.

    Args:
        model: packed.
        config: its settings.
        processor: of the model.
    """
    call = running_call(PreTrainedModel.save_pretrained)
    if call is None or not call["is_main_process"]:
        return
    folder = Path(call["save_directory"])
    pushed = _running_push(call)
    write_remote_code(model.config, folder)
    if not keeps(folder / CARD):
        card = model_card(model_facts(model, config), model.model_tags or ())
        (named(card, pushed["repo_id"]) if pushed else card).save(folder / CARD)
    found = processor.find(model.config)
    if hasattr(found, "save_pretrained"):
        write_processor(found, folder, _on_the_hub(pushed))


def _running_push(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables of whatever uploads what is being saved; none where nothing does."""
    if call["push_to_hub"]:
        return call
    return running_call(hub.PushToHubMixin.push_to_hub) or {}


def _on_the_hub(pushed: Mapping[str, Any]) -> list[str]:
    """Files of the repository that is pushed to, which exists by now."""
    if "repo_id" not in pushed:
        return []
    api = HfApi(token=pushed.get("token"))
    revision = pushed.get("revision")
    if revision is not None:
        names = [branch.name for branch in api.list_repo_refs(pushed["repo_id"]).branches]
        revision = revision if revision in names else None  # a new branch begins as the main one is
    return list(api.list_repo_files(pushed["repo_id"], revision=revision))


class FolderCard(ModelCard):
    """A card that gives way to the one of the folder it is saved to."""

    def save(self, filepath: Path | str) -> None:
        """Write it where there is none; else add its tags to the one that is there."""
        if not Path(filepath).is_file():
            super().save(filepath)
            return
        try:
            here = ModelCard.load(Path(filepath), ignore_metadata_errors=True)
        except (ValueError, YAMLError) as error:
            warn(f"{CARD} goes to the Hub as it is, without tags, since its head cannot be read ({error}).")
            return
        ours = not is_users(here)
        with_tags(here, self.data.tags or ())
        (sign(here) if ours else here).save(filepath)


def with_folder_card(create: Callable[..., Any]) -> Callable[..., Any]:
    """`create_and_tag_model_card` that lets the folder's card be, unless somebody has written the repository's."""

    @functools.wraps(create)
    def made(*arguments: Any, **named: Any) -> Any:
        card = create(*arguments, **named)
        pushed = sys._getframe(1).f_locals.get("self")
        packed = isinstance(pushed, PreTrainedModel) and any(isinstance(m, SABLinear) for m in pushed.modules())
        return FolderCard(card.content, ignore_metadata_errors=True) if packed and not is_users(card) else card

    made.without_folder = create  # type: ignore[attr-defined]
    return made


def install() -> None:
    """Have Transformers push the cards of packed models. Doing it again changes nothing."""
    for module in (hub, modeling_utils):
        create = module.create_and_tag_model_card
        module.create_and_tag_model_card = with_folder_card(getattr(create, "without_folder", create))
