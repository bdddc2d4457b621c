import json
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from optimum_sab import SABConfig
from optimum_sab.calibration.samples.reading import read_samples
from optimum_sab.data.builtin import builtin_samples
from optimum_sab.errors import MissingDependencyError, SABWarning, SampleError

CHAT = [{"role": "user", "content": "Who has the key?"}, {"role": "assistant", "content": "Zoe"}]


@pytest.fixture
def picture():
    return Image.new("RGB", (112, 112), (200, 100, 50))


def shown(image, text="What is this?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def read(source, count=10, seed=0, visual=True):
    return read_samples(source, count, seed, visual)


def write_lines(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


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


# -- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, "builtin"])
@pytest.mark.parametrize("visual", [True, False])
def test_builtin_set_is_the_default(source, visual):
    samples = read_samples(source, 5, 3, visual)
    expected = list(builtin_samples(5, 3, visual))
    assert len(samples) == 5
    assert plain(samples) == plain(expected)
    assert any(not isinstance(sample, str) for sample in samples) == visual


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (["One.", "Two."], ["One.", "Two."]),
        (("One.", "Two."), ["One.", "Two."]),
        (CHAT, [CHAT]),
        ([CHAT, CHAT], [CHAT, CHAT]),
        (["One.", CHAT, {"messages": CHAT}], ["One.", CHAT, CHAT]),
    ],
    ids=["texts", "tuple", "chat", "chats", "mixed"],
)
def test_texts_and_chats_are_taken_as_they_are(source, expected):
    assert read(source) == expected


@pytest.mark.parametrize("source", [["a", "b", "c"], [CHAT, "b", "c"]])
def test_count_takes_the_first_samples(source):
    assert read(source, count=2) == source[:2]


def test_jsonl_holds_texts_chats_and_pictures_beside_the_file(tmp_path, picture, monkeypatch):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    picture.save(tmp_path / "data" / "pictures" / "a.png")
    picture.save(tmp_path / "elsewhere.png")
    content = [{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "Look."}]
    url = [{"type": "image", "image": "https://example.org/a.png"}, {"type": "image", "path": "pictures/a.png"}]
    path = write_lines(
        tmp_path / "data" / "samples.jsonl",
        {"text": "A text."},
        "",
        {"messages": CHAT},
        {"text": "<image>\nWhat is it?", "image": "pictures/a.png"},
        {"text": "Both?", "images": ["pictures/a.png", str(tmp_path / "elsewhere.png")]},
        {"messages": [{"role": "user", "content": content}]},
        {"messages": [{"role": "user", "content": url}]},
        {"text": "No picture.", "image": None},
        '"A bare string."',
    )
    monkeypatch.chdir("/")
    dot = {"type": "image", "image": (200, 100, 50)}
    for source in (path, str(path)):
        samples = read(source)
        assert plain(samples) == [
            "A text.",
            CHAT,
            [{"role": "user", "content": [dot, {"type": "text", "text": "What is it?"}]}],
            [{"role": "user", "content": [dot, dot, {"type": "text", "text": "Both?"}]}],
            [{"role": "user", "content": [dot, {"type": "text", "text": "Look."}]}],
            [{"role": "user", "content": [url[0], dot]}],
            "No picture.",
            "A bare string.",
        ]


def test_jsonl_may_hold_unicode_line_separators_inside_strings(tmp_path):
    text = "one\u2028two\x85three\x0cfour"
    path = write_lines(tmp_path / "s.jsonl", json.dumps({"text": text}, ensure_ascii=False), {"text": "next"})
    assert read(path) == [text, "next"]


def test_picture_of_a_file_is_rgb(tmp_path):
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "a.png")
    [[message]] = read(write_lines(tmp_path / "s.jsonl", {"text": "What?", "image": "a.png"}))
    assert message["content"][0]["image"].mode == "RGB"


class Rows(list):
    """A streamed dataset, as far as it is used."""

    def shuffle(self, seed, buffer_size):
        self.seed = seed
        return Rows(self[seed:] + self[:seed])

    def take(self, count):
        return Rows(self[:count])


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the `datasets` package; set its rows, read the calls."""
    module = ModuleType("datasets")
    module.rows, module.calls = Rows(), []

    def load_dataset(name, **options):
        module.calls.append((name, options))
        if isinstance(module.rows, Exception):
            raise module.rows
        return module.rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_dataset_rows_become_samples(datasets, picture):
    datasets.rows = Rows(
        [
            {"messages": CHAT},
            {"text": "A text."},
            {"question": "What is it?", "image": picture},
            {"caption": "Two of them.", "images": [picture, picture]},
            {"prompt": "No picture.", "image": None},
        ]
    )
    dot = {"type": "image", "image": (200, 100, 50)}
    assert plain(read("owner/name")) == [
        CHAT,
        "A text.",
        [{"role": "user", "content": [dot, {"type": "text", "text": "What is it?"}]}],
        [{"role": "user", "content": [dot, dot, {"type": "text", "text": "Two of them."}]}],
        "No picture.",
    ]
    assert datasets.calls == [("owner/name", {"split": "train", "streaming": True})]


def test_columns_that_are_not_calibrated_on_are_named_once(datasets):
    datasets.rows = Rows({"text": str(i), "id": i, "source": "web"} for i in range(3))
    with pytest.warns(
        SABWarning, match="owner/name row 0 has columns that are not calibrated on: 'id', 'source'"
    ) as told:
        read("owner/name")
    assert len(told) == 1


def test_a_column_that_is_nearly_one_that_is_read_is_told_what_was_meant(datasets):
    datasets.rows = Rows([{"text": "What is it? A cup.", "imgae": 7}])
    with pytest.warns(SABWarning, match=r"not calibrated on: 'imgae'; did you mean 'image'\?$"):
        read("owner/name")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "What?", "said": "A cup."}, "'said'. It has 'question' and no 'answer': if one of"),
        ({"instruction": "Say it.", "said": "It."}, "'said'. It has 'instruction' and no 'output': if one of"),
        ({"prompt": "It is", "rest": "a cup."}, "'rest'. It has 'prompt' and no 'completion': if one of"),
        ({"question": "What?", "id": 7}, "'id'."),
        ({"question": "What?", "answer_type": 7}, "'answer_type'; did you mean 'answer'?"),
        ({"question": "What?", "answer": "A cup.", "label": "cup"}, "'label'."),
        ({"text": "A cup.", "label": "cup"}, "'label'."),
    ],
)
def test_a_question_whose_answer_has_another_name_is_told_what_to_call_it(datasets, row, said):
    datasets.rows = Rows([row])
    with pytest.warns(SABWarning) as told:
        read("owner/name")
    (message,) = [str(each.message) for each in told]
    assert f"not calibrated on: {said}" in message
    assert message.endswith("call it that.") is ("and no" in said)


@pytest.mark.parametrize("question", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("answer", ["answer", "completion", "output", "response"])
def test_an_answer_is_read_by_any_of_its_names(datasets, picture, question, answer):
    datasets.rows = Rows([{question: "What?", answer: "A cup.", "image": picture}])
    [[asked, answered]] = read("owner/name")
    assert asked["content"][1] == {"type": "text", "text": "What?"}
    assert answered == {"role": "assistant", "content": "A cup."}


def test_of_two_answers_the_one_with_the_usual_name_is_read(datasets):
    datasets.rows = Rows([{"question": "What?", "answer": "A cup.", "response": "A mug."}])
    with pytest.warns(SABWarning, match="not calibrated on: 'response'"):
        [[_, answered]] = read("owner/name")
    assert answered["content"] == "A cup."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "What?", "label": "A cup."}, "has 'question' and no 'answer', and a column 'label', which"),
        ({"question": "What?", "answers": ["A cup."]}, "has 'question' and no 'answer', and a column 'answers'"),
        ({"question": "What?", "anwser": "A cup."}, "has 'question' and no 'answer', and a column 'anwser'"),
        ({"instruction": "Say it.", "Target": "It."}, "has 'instruction' and no 'output', and a column 'Target'"),
        ({"question": "How many?", "answer": 3}, "'answer' must be a text, and is the int 3"),
        ({"prompt": "It is", "completion": ["a cup."]}, "'completion' must be a text, and is the list"),
        ({"question": "What?", "output": "A.", "response": "B."}, "the columns 'response' and 'output'; keep the one"),
    ],
)
def test_an_answer_that_is_not_read_is_refused_before_it_costs_a_run(datasets, row, said):
    datasets.rows = Rows([row])
    with pytest.raises(SampleError) as refused:
        read("owner/name")
    message = str(refused.value)
    assert message.startswith("owner/name row 0")
    assert said.replace("'response' and 'output'", "'output' and 'response'") in message


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("usr", "; did you mean 'user'?"),
        ("Assistant", "; did you mean 'assistant'?"),
        ("critic", "; the usual ones are user, assistant, system, developer, tool, "),
    ],
)
def test_a_role_that_is_none_of_the_usual_ones_is_named_once(tmp_path, role, hint):
    message = {"role": role, "content": "Who has the key?"}
    path = write_lines(tmp_path / "s.jsonl", *[{"messages": [message, message, CHAT[1]]}] * 3)
    with pytest.warns(SABWarning) as told:
        samples = read(path)
    assert samples == [[message, message, CHAT[1]]] * 3  # as it was given
    (said,) = [str(each.message) for each in told]
    assert said.startswith(
        f"calibration samples have messages with the role {role!r}, which is none of the usual ones and goes to the "
        f"model's chat template as it is{hint}"
    )


def test_the_usual_roles_and_known_speakers_are_passed_over():
    roles = "user assistant system developer tool function model ipython document context environment observation"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read([[{"role": role, "content": "x"}] for role in (*roles.split(), "human", "gpt")])
        read([{"conversations": [{"from": "gpt", "value": "x"}]}])


class Countless:
    """Rows as a torch dataset has them, which ends by its length alone."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"text": str(index)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((text for text in ("a", "b")), ["a", "b"]),
        (map(str, range(10**9)), [str(i) for i in range(10)]),
        (Countless(), ["0", "1", "2"]),
        ({"text": "one row"}, ["one row"]),
        ({"messages": CHAT}, [CHAT]),
    ],
    ids=["generator", "endless", "dataset", "row", "row of messages"],
)
def test_rows_come_from_whatever_can_be_gone_through(source, expected):
    assert read(source) == expected


def test_splits_are_to_be_chosen_from():
    splits = {"train": SimpleNamespace(column_names=["text"]), "test": SimpleNamespace(column_names=["text"])}
    with pytest.raises(SampleError, match=r"has the splits train, test; give one, as data\['train'\]"):
        read(splits)


def test_an_open_file_is_refused(tmp_path):
    """Its lines are JSON, and would be calibrated on as text."""
    with write_lines(tmp_path / "s.jsonl", {"text": "a"}).open() as file:
        with pytest.raises(SampleError, match="calibration=TextIOWrapper is not understood"):
            read(file)
        with pytest.raises(SampleError, match="calibration=TextIOWrapper is not understood"):
            read(SABConfig(calibration=file).calibration)


def test_dataset_takes_split_count_and_seed(datasets):
    datasets.rows = Rows({"text": str(i)} for i in range(6))
    assert read("owner/na.me-1:validation", count=3, seed=2) == ["2", "3", "4"]
    assert datasets.calls == [("owner/na.me-1", {"split": "validation", "streaming": True})]


def test_text_with_a_slash_is_not_a_dataset(datasets):
    with pytest.raises(
        SampleError, match=r"'This and/or that\.' is one text, which is no calibration data; give a list"
    ):
        read("This and/or that.")
    assert datasets.calls == []


# -- bad sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no calibration samples; give at least one, or calibration='builtin'"),
        (42, "calibration=int is not understood; give texts, chats"),
        (b"bytes", "calibration=bytes is not understood"),
        ({"a", "b"}, "calibration=set is not understood"),
        ({}, "calibration sample 0 has columns none"),
        (
            {"samples": 32},
            "what a finished model records of samples that were given as objects; give the samples again",
        ),
        (["ok", 42], "calibration sample 1 is a int; give a text, a list of messages"),
        (["ok", "ok", {"texts": "a"}], r"calibration sample 2 has columns texts; did you mean 'text'\? One of 'mess"),
        (
            [{"quesiton": "a", "answer": "b"}],
            r"columns quesiton, answer; did you mean 'question'\? One of 'messages', '",
        ),
        ([{"label": "a"}], "calibration sample 0 has columns label; one of 'messages', 'text'"),
        (["ok", []], "calibration sample 1 is a list"),
        ([CHAT, [{"role": "user"}]], "calibration sample 1 is a list"),
        ("missing.jsonl", "the calibration file 'missing.jsonl' does not exist"),
    ],
)
def test_source_that_is_not_understood_is_named(source, message):
    with pytest.raises(SampleError, match=message):
        read(source)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"text": \n', r" is not JSON: Expecting value at column 10\.$"),
        ("{'text': 'a'}", r" is not JSON: Expecting property name enclosed in double quotes at column 2\.$"),
        ({"captions": "a"}, r"has columns captions; did you mean 'caption'\? One of 'messages', 'text'"),
        ({"text": 5}, "'text' must be a text, and is the int 5"),
        ("[1, 2]", "is a list; give a text, a list of messages"),
        (
            {"messages": "hello"},
            "'messages' must be a list of messages with 'role' and 'content', and is the str 'hello'",
        ),
        ({"messages": [{"from": "human"}]}, "'messages' must be a list of messages"),
        (
            {"text": "a", "image": "gone.png"},
            "the picture '.*gone.png' does not exist; mend the path, which counts from the folder of the calib",
        ),
        ({"text": "a", "image": "text.png"}, "the picture '.*text.png' cannot be read"),
        ({"text": "a", "image": "torn.png"}, "the picture '.*torn.png' cannot be read"),
        ({"text": "a", "image": 5}, "has a picture given as int, which is not understood; give a path"),
        (
            {"text": "a", "images": "a.png"},
            r"'images' must be a list, and is the str 'a\.png'; name the column 'image' for one",
        ),
        ({"text": "a", "image": "a\0b.png"}, r"the picture '.*a\\x00b\.png' does not exist"),
        ('{"text": ' + "7" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ("[" * 100_000, "is nested too deeply"),
        (r'{"text": "a \ud800 b"}', r"has the lone surrogate '\\ud800' at character 2"),
        (r'{"messages": [{"role": "user", "content": "\udfff"}]}', "has the lone surrogate"),
        (
            r'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}',
            "has the lone surrogate",
        ),
        ({"messages": shown("gone.png")}, "the picture '.*gone.png' does not exist"),
    ],
)
def test_bad_line_is_named_by_its_number(tmp_path, record, message):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64), (9, 8, 7)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    path = write_lines(tmp_path / "samples.jsonl", {"text": "fine"}, "", record)
    with pytest.raises(SampleError, match=rf"^samples\.jsonl line 3.*{message}"):
        read(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json"])
def test_a_file_without_samples_is_named(tmp_path, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(SampleError, match=rf"there are no calibration samples in '.*{name}'; give at least one"):
        read(tmp_path / name)


def test_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8-sig")
    (tmp_path / "s.json").write_text('["a", {"text": "b"}]', encoding="utf-8-sig")
    assert read(tmp_path / "s.jsonl") == read(tmp_path / "s.json") == ["a", "b"]


def test_json_file_is_a_list_or_lines(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}, "A text."]
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    assert read(tmp_path / "list.json") == read(write_lines(tmp_path / "lines.json", *rows[:1], '"A text."'))
    assert read(tmp_path / "list.json") == [chat, "A text."]
    assert read(tmp_path / "chat.json") == [chat]
    (tmp_path / "bad.json").write_text(json.dumps([*rows, 5]))
    with pytest.raises(SampleError, match=r"^bad\.json entry 2 is a int"):
        read(tmp_path / "bad.json")


def test_no_more_lines_are_read_than_samples_are_wanted(tmp_path):
    assert read(write_lines(tmp_path / "s.jsonl", {"text": "a"}, "no JSON"), count=1) == ["a"]


def test_empty_file_is_an_error(tmp_path):
    with pytest.raises(SampleError, match="no calibration samples"):
        read(write_lines(tmp_path / "s.jsonl", "", "  "))


def test_file_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "s.jsonl").write_bytes('{"text": "Größe"}'.encode("latin-1"))
    with pytest.raises(SampleError, match=r"s\.jsonl' is not UTF-8 behind line 0"):
        read(tmp_path / "s.jsonl")


def test_dataset_row_without_text_names_its_columns(datasets):
    datasets.rows = Rows([{"text": "fine"}, {"label": 3, "image": None}])
    with pytest.raises(SampleError, match="owner/name row 1 has columns label, image; one of 'messages', 'text'"):
        read("owner/name")


@pytest.mark.parametrize("error", [FileNotFoundError("no such dataset"), ValueError("unknown split")])
def test_dataset_that_cannot_be_loaded_is_named(datasets, error):
    datasets.rows = error
    with pytest.raises(SampleError, match=f"calibration='owner/name' cannot be read as a Hub dataset: {error}"):
        read("owner/name")


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingDependencyError, match=r"'owner/name' is no file here and names a Hub dataset.*pip install datasets"
    ):
        read("owner/name")


def test_missing_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    path = write_lines(tmp_path / "s.jsonl", {"text": "a", "image": "a.png"})
    with pytest.raises(MissingDependencyError, match=r"pip install 'optimum-sab\[quantize\]'"):
        read(path)
