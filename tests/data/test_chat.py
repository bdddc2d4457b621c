from optimum_sab.data.chat import Turn, chat_messages

TURNS = [Turn("What is it?", "A ring."), Turn("And its colour?", "Red.")]


def said(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def test_chat_messages_take_turns_with_the_picture_before_the_first_prompt():
    picture = object()
    messages = chat_messages(TURNS, picture)
    assert messages[0]["content"].pop(0) == {"type": "image", "image": picture}
    assert messages == chat_messages(TURNS)


def test_chat_messages_without_a_picture_are_text_alone():
    expected = [said("user", "What is it?"), said("assistant", "A ring.")]
    expected += [said("user", "And its colour?"), said("assistant", "Red.")]
    assert chat_messages(TURNS) == expected
