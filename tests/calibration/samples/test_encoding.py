import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from optimum_sab.calibration.samples.encoding import encode_samples
from optimum_sab.calibration.samples.inputs import SampleSource, given_inputs
from optimum_sab.errors import SABWarning, SampleError
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.processor import load_processor

CHAT = [{"role": "user", "content": "Who has the key?"}, {"role": "assistant", "content": "Zoe"}]
PICTURED_TOKENS = 16  # of a 112 x 112 picture


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture(scope="module")
def tokenizer(processor):
    """A language model's: its template joins strings, as those of text models do."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    return tokenizer


@pytest.fixture
def picture():
    return Image.new("RGB", (112, 112), (200, 100, 50))


def plain(samples):
    """Samples with pictures as their colour in the middle, so that they compare."""

    def part(p):
        return {**p, "image": p["image"].getpixel((5, 5))} if isinstance(p.get("image"), Image.Image) else p

    return [
        s
        if isinstance(s, str)
        else [
            {**m, "content": m["content"] if isinstance(m["content"], str) else list(map(part, m["content"]))}
            for m in s
        ]
        for s in samples
    ]


def shown(image, text="What is this?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def text_of(processor, inputs):
    return processor.tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.compat
def test_text_is_encoded_and_cut_to_the_sequence_length(processor):
    text = "The red boat left the harbour at noon. " * 20
    whole, cut = (encode_samples([text], processor, n)[0] for n in (10_000, 12))
    assert text_of(processor, whole) == text
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (1, 12)
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :12])
    assert "pixel_values" not in whole


@pytest.mark.compat
@pytest.mark.parametrize("parts", [False, True])
def test_chat_without_pictures_is_encoded_and_cut(processor, parts):
    chat = [{**m, "content": [{"type": "text", "text": m["content"]}] if parts else m["content"]} for m in CHAT]
    whole, cut = (encode_samples([chat], processor, n)[0] for n in (10_000, 6))
    assert text_of(processor, whole) == (
        "<|im_start|>user\nWho has the key?<|im_end|>\n<|im_start|>assistant\nZoe<|im_end|>\n"
    )
    assert {v.shape for v in cut.values()} == {(1, 6)}
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :6])


@pytest.mark.compat
def test_chat_with_a_picture_keeps_all_its_image_tokens(processor, picture):
    [inputs] = encode_samples([shown(picture)], processor, 4)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == PICTURED_TOKENS
    assert inputs["pixel_values"].shape[0] == 4 * PICTURED_TOKENS
    assert text_of(processor, inputs).endswith("What is this?<|im_end|>\n")


@pytest.mark.compat
@pytest.mark.parametrize("form", ["image", "path", "url", "image_url", "image_url text"])
def test_picture_may_be_given_in_every_form_of_the_processors(processor, picture, tmp_path, form):
    picture.save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    part = {
        "image": {"type": "image", "image": file},
        "path": {"type": "image", "path": file},
        "url": {"type": "image", "url": file},
        "image_url": {"type": "image_url", "image_url": {"url": file}},
        "image_url text": {"type": "image_url", "image_url": file},
    }[form]
    [inputs] = encode_samples([[{"role": "user", "content": [part]}]], processor, 64)
    [expected] = encode_samples([[{"role": "user", "content": shown(picture)[0]["content"][:1]}]], processor, 64)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_parts_with_empty_entries_are_read_as_if_without(processor, picture):
    """Rows of a dataset have every key in every part, None where it does not apply."""
    strict = copy.copy(processor)  # templates ask which keys a part has, as Qwen's own does
    strict.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if 'image' in c %}<|image_pad|>"
        "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    parts = [
        {"type": "image", "image": picture, "text": None},
        {"type": "text", "text": "What is this?", "image": None},
    ]
    [inputs] = encode_samples([[{"role": "user", "content": parts}]], strict, 64)
    assert text_of(processor, inputs) == "<|image_pad|>" * PICTURED_TOKENS + "What is this?"


def test_samples_are_not_changed_by_encoding(processor, picture):
    sample = [*shown(picture), {"role": "assistant", "content": "a colour"}]
    before = copy.deepcopy(plain([sample]))
    encode_samples([sample], processor, 64)
    assert plain([sample]) == before


@pytest.mark.parametrize("parts", [False, True])
def test_tokenizers_template_is_given_plain_strings(tokenizer, parts):
    chat = [
        {**m, "content": [{"type": "text", "text": t} for t in m["content"].partition(" ")] if parts else m["content"]}
        for m in CHAT
    ]
    [inputs] = encode_samples([chat], tokenizer, 64)
    assert tokenizer.decode(inputs["input_ids"][0]) == "user: Who has the key?\nassistant: Zoe\n"
    [cut] = encode_samples([chat], tokenizer, 3)
    assert cut["input_ids"].shape == (1, 3)


@pytest.mark.parametrize("placeholder", ["<image>", "<|image_pad|>", "<image_soft_token>", "[IMG]"])
@pytest.mark.parametrize("form", ["text", "string", "part"])
def test_placeholder_without_its_picture_is_named(processor, placeholder, form):
    text = f"See {placeholder} here."
    content = [{"type": "text", "text": text}] if form == "part" else text
    sample = text if form == "text" else [{"role": "user", "content": content}]
    with pytest.raises(SampleError) as error:
        encode_samples(["fine", sample], processor, 64)
    assert str(error.value).startswith("calibration sample 1 refers to a picture")
    assert repr(placeholder) in str(error.value)
    assert "{'type': 'image', 'image': ...}" in str(error.value)


def test_placeholder_of_the_processor_itself_is_refused():
    own = SimpleNamespace(image_token="<pic>", tokenizer=None)
    with pytest.raises(SampleError, match=r"calibration sample 0 refers to a picture .'<pic>'."):
        encode_samples(["See <pic>."], own, 64)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.compat
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (user({"type": "image"}), r"has a part of type 'image' without one; give \{'type': 'image', 'image': ...\}"),
        (user({"type": "image", "image": None}), "has a part of type 'image' without one"),
        (user({"type": "image_url", "image_url": {}}), "has a part of type 'image' without one"),
        (user({"type": "video"}), "has a part of type 'video' without one"),
        (user({"type": "video", "video": "a.mp4"}), "the file 'a.mp4' does not exist"),
        (
            user({"type": "video", "video": "https://example.org/a.mp4"}),
            "(holds a part of type 'video' and the model's processor reads none|cannot be prepared)",
        ),
        (user({"type": "image", "path": "/gone.png"}), "the picture '/gone.png' does not exist"),
        (user({"type": "image", "image": 5}), "has a picture given as int, which is not understood"),
        (
            user({"type": "sound", "sound": "x"}),
            "has a part of type 'sound', which is not understood; the types are text",
        ),
        (user({"words": "no type"}), "has a message with the content .*no type.*; give a text, or a list of parts"),
        (user({"text": "a", "image": None, "video": "b"}), "has a message with the content"),
        (
            user({"type": "text", "text": "a", "image": "b"}),
            "has a part of type 'text' with 'image', which is not under",
        ),
        (user({"type": "image", "image": "a", "min_pixels": 5}), "has a part of type 'image' with 'min_pixels'"),
        (user({"type": "image", "image": "a", "url": "b"}), "has a part of type 'image' with image and url; give one"),
        ([{"role": "user", "content": "a", "images": []}], "has a message with the entry 'images'"),
        (user({"type": "text"}), "has a message with the content"),
        (user("a string"), "has a message with the content"),
        ([{"role": "user", "content": None}], "has a message with the content 'None'"),
        ([{"role": "user", "content": 5}], "has a message with the content '5'"),
        ("", "has no tokens; remove it"),
    ],
)
def test_sample_that_cannot_be_encoded_is_named_by_its_number(processor, sample, message):
    with pytest.raises(SampleError, match=f"^calibration sample 2:? {message}"):
        encode_samples(["fine", CHAT, sample], processor, 64)


def test_template_that_refuses_a_chat_is_a_sample_error(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SampleError, match=r"calibration sample 0 cannot be prepared.*roles must alternate"):
        encode_samples([CHAT], strict, 64)


def test_chat_needs_a_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(SampleError, match=r"calibration sample 1 is a chat and .* no chat template; give plain texts"):
        encode_samples(["fine", CHAT], bare, 64)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_picture_is_refused_where_only_text_is_read(tokenizer, kind):
    sample = user({"type": kind, kind: "https://example.org/file"}, {"type": "text", "text": "What?"})
    with pytest.raises(SampleError, match=r"calibration sample 0 holds more than text and .* takes text only"):
        encode_samples([sample], tokenizer, 64)


def test_picture_that_the_processor_passes_over_is_an_error(picture):
    class Deaf:
        chat_template = "has one"
        tokenizer = None

        def apply_chat_template(self, messages, **options):
            return BatchFeature({"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 4)})

    with pytest.raises(SampleError, match=r"calibration sample 0 holds a picture and .* passed it over"):
        encode_samples([shown(picture)], Deaf(), 64)
    assert encode_samples([CHAT], Deaf(), 64)[0]["input_ids"].shape == (1, 4)


def test_package_that_the_processor_lacks_is_not_blamed_on_the_sample():
    class Lacking:
        chat_template = "has one"
        tokenizer = None

        def apply_chat_template(self, messages, **options):
            raise ImportError("apply_chat_template requires jinja2")

    with pytest.raises(ImportError, match="requires jinja2"):
        encode_samples([CHAT], Lacking(), 64)


# -- tools -------------------------------------------------------------------------------------------------------------

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TOLD = [
    {"role": "user", "content": "What is the time?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "clock"}}]},
    {"role": "tool", "content": "noon", "name": "clock"},
]
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}"
    "{% for m in messages %}{{ m['role'] }}: "
    "{% for p in m['content'] if m['content'] is not string %}{{ p['text'] }}{% endfor %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}({{ c['function']['name'] }}){% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["processor", "tokenizer"])
def test_tools_and_their_calls_come_to_the_chat_template(processor, tokenizer, kind):
    subject = copy.copy(processor) if kind == "processor" else copy.deepcopy(tokenizer)
    subject.chat_template = WITH_TOOLS
    [inputs] = encode_samples([{"messages": TOLD, "tools": [CLOCK]}], subject, 64)
    assert text_of(processor, inputs) == "[clock]user: What is the time?\nassistant: (clock)\ntool: noon\n"


def told_of(samples, subject):
    """The names of entries that are told to be left out, each as often as it is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        encode_samples(samples, subject, 64)
    assert all("which the model's chat template does not show: it is left out." in str(each.message) for each in told)
    return sorted(str(each.message).split("'")[1] for each in told)


@pytest.mark.compat
def test_tools_that_the_template_does_not_show_are_named_once(processor):
    sample = {"messages": TOLD, "tools": [CLOCK]}
    assert told_of([sample, sample], processor) == ["name", "tool_calls", "tools"]
    with pytest.warns(SABWarning, match="^calibration samples have 'tools', which the model's"):
        [inputs] = encode_samples([sample], processor, 64)
    assert text_of(processor, inputs).endswith("<|im_start|>tool\nnoon<|im_end|>\n")


THINKING = (  # as Qwen3's: what was thought before the last turn is left out
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% for p in m['content'] if m['content'] is not string %}{{ p['text'] }}{% endfor %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% endif %}"
    "{% for c in m.tool_calls or [] %}({{ c['name'] }}){% endfor %}{% endfor %}"
)


def thought(*, name=None, first=None, last="So it is Zoe."):
    asked = {"role": "user", "content": "Who?", **({"name": name} if name else {})}
    turn = {"role": "assistant", "content": "Zoe"}
    return [asked, {**turn, "reasoning_content": first}, asked, {**turn, "reasoning_content": last}]


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["processor", "tokenizer"])
def test_entries_of_messages_that_the_template_reads_come_to_it_in_silence(processor, tokenizer, kind):
    subject = copy.copy(processor) if kind == "processor" else copy.deepcopy(tokenizer)
    subject.chat_template = THINKING
    assert told_of([thought()], subject) == []
    assert told_of([thought(first="Hm.", last=None), thought(), thought(first="Hm.")], subject) == []
    [inputs] = encode_samples([thought()], subject, 64)
    assert text_of(processor, inputs).endswith("assistant: <think>So it is Zoe.</think>Zoe")


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["processor", "tokenizer"])
def test_entries_of_messages_that_the_template_passes_over_are_named_once(processor, tokenizer, kind):
    subject = copy.copy(processor) if kind == "processor" else tokenizer
    assert told_of([thought(), thought()], subject) == ["reasoning_content"]
    subject = copy.copy(subject)
    subject.chat_template = THINKING  # it has a "name", of calls of tools, and none of messages
    assert told_of([thought(name="Ann"), thought(name="Bo")], subject) == ["name"]
    assert told_of([thought(first="Hm.", last=None)], subject) == ["reasoning_content"]
    row = [{**CHAT[0], "tool_call_id": "7", "weight": 0}, CHAT[1]]
    assert told_of([row], subject) == ["tool_call_id", "weight"]


def test_the_warnings_of_a_set_are_told_once_where_it_is_read_too(processor):
    source = SampleSource([thought(), {"messages": thought(), "id": 1}, {"messages": thought(), "id": 2}], 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        given_inputs(SimpleNamespace(config=SimpleNamespace()), processor, source)
    assert sorted(str(each.message).split("'")[1] for each in told) == ["id", "reasoning_content"]


def test_system_column_and_pictures_beside_a_chat_are_encoded(processor, picture):
    row = {"messages": CHAT, "images": [picture], "system": "Look."}
    [inputs] = encode_samples([row], processor, 64)
    assert text_of(processor, inputs) == (
        "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * PICTURED_TOKENS
        + "<|vision_end|>Who has the key?<|im_end|>\n<|im_start|>assistant\nZoe<|im_end|>\n"
    )


# -- prepared arguments ------------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_what_a_processor_has_prepared_is_taken_as_it_is(processor, picture):
    prepared = processor.apply_chat_template(
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT] + shown(picture),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    [inputs] = encode_samples([prepared], processor, 4)
    assert set(inputs) == set(prepared)
    assert all(torch.equal(inputs[name], value) for name, value in prepared.items())
    [cut] = encode_samples([processor.tokenizer("The red boat left the harbour at noon.")], processor, 4)
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (1, 4)


def test_videos_come_to_a_processor_that_reads_them(tmp_path, picture):
    class Seeing:
        chat_template = "has one"
        tokenizer = video_processor = SimpleNamespace(chat_template=None)

        def apply_chat_template(self, messages, **options):
            self.parts = messages[0]["content"]
            return BatchFeature({"input_ids": torch.ones(1, 4), "pixel_values_videos": torch.ones(1, 4)})

    (tmp_path / "a.mp4").write_bytes(b"a film")
    processor = Seeing()
    encode_samples([{"messages": CHAT, "videos": [tmp_path / "a.mp4"]}], processor, 64)
    assert processor.parts[0] == {"type": "video", "video": str(tmp_path / "a.mp4")}
    encode_samples([{"messages": CHAT, "video": [picture, picture]}], processor, 64)
    assert [frame.size for frame in processor.parts[0]["video"]] == [picture.size] * 2
