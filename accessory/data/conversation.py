"""The dialogue form, under the name by which users' programs import it."""

from accessory.text.conversation import Conversation, default_conversation

__all__ = ["Conversation", "default_conversation"]
