"""What a chat template shows of what messages have beside role and content: it passes over the rest without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimum_sab.errors import warn

Chat = Sequence[Mapping[str, Any]]
_ALWAYS = ("role", "content")
_TOOLS = "tools"


@dataclass
class TemplateWatch:
    """What the template showed of the samples of one set.

    Attributes:
        hidden: entries that made no difference to a sample, by what to say of them.
        shown: those that made one to another sample: what a template leaves out of earlier turns, say, it knows.
    """

    hidden: dict[str, None] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)

    def look(self, template_owner: Any, chat: Chat, tools: Sequence[Any]) -> None:
        """Find out what of a chat is shown.

        Args:
            template_owner: processor or tokenizer with the ``chat_template``.
            chat: messages as they are given to it.
            tools: of the chat.
        """
        entries = dict.fromkeys(key for message in chat for key in message if key not in _ALWAYS)
        for key in entries:
            self._note(f"messages of calibration samples have {key!r}", template_owner, key, (chat, tools))
        if tools:
            self._note(f"calibration samples have {_TOOLS!r}", template_owner, "", (chat, tools))

    def warn(self) -> None:
        """Name what was never shown, each once."""
        for words in self.hidden:
            if words not in self.shown:
                warn(f"{words}, which the model's chat template does not show: it is left out.")

    def _note(self, words: str, template_owner: Any, key: str, given: tuple[Chat, Sequence[Any]]) -> None:
        if words in self.shown:
            return
        if _shows(template_owner, key, *given):
            self.shown.add(words)
        else:
            self.hidden[words] = None


def _shows(template_owner: Any, key: str, chat: Chat, tools: Sequence[Any]) -> bool:
    """Whether an entry of messages, or the tools where it is empty, makes a difference to the text."""
    if (key or _TOOLS) not in str(template_owner.chat_template):
        return False
    without = [{k: v for k, v in message.items() if k != key} for message in chat] if key else chat
    try:
        whole = _rendered(template_owner, chat, tools)
        return whole != _rendered(template_owner, without, tools if key else ())
    except Exception:  # the template cannot do without it, or fails on the chat, which preparing it will say
        return True


def _rendered(template_owner: Any, chat: Chat, tools: Sequence[Any]) -> Any:
    return template_owner.apply_chat_template(list(chat), tokenize=False, **({"tools": list(tools)} if tools else {}))
