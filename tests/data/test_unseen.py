from optimum_sab.data.builtin import builtin_samples
from optimum_sab.data.passages import passages
from optimum_sab.data.unseen import PICTURES, unseen_chats, unseen_texts


def test_unseen_texts_are_in_no_calibration_set():
    texts = unseen_texts()
    assert len(texts) == len(set(texts)) == 6
    sentences = {line.strip() for text in texts for line in text.replace(". ", ".\n").splitlines() if len(line) > 30}
    built_in = "\n".join(passages())
    assert sentences
    assert [sentence for sentence in sentences if sentence in built_in] == []


def test_unseen_chats_have_a_picture_each_and_are_in_no_calibration_set():
    chats = unseen_chats()
    pictures = [part["image"] for chat in chats for message in chat for part in message["content"] if "image" in part]
    assert len(pictures) == len(chats) == PICTURES
    calibrated = {
        part["image"].tobytes()
        for sample in builtin_samples(64, 0)
        if not isinstance(sample, str)
        for message in sample
        for part in message["content"]
        if "image" in part
    }
    assert not calibrated & {picture.tobytes() for picture in pictures}
