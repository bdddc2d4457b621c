"""The model card of a packed model: README.md with the Hub's metadata, in figures and with how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from optimum_sab.core.spread import spread
from optimum_sab.data.named_source import names_dataset
from optimum_sab.explanation import TORCHVISION
from optimum_sab.hf.hub.authorship import sign, with_tags
from optimum_sab.hf.hub.facts import ModelFacts
from optimum_sab.hf.hub.markdown import cell, code, plain
from optimum_sab.wording import counted

HERE = "path/to/this/checkpoint"
UNRELEASED = "before there is a release on PyPI: from a clone, which whoever made this checkpoint has"
_TITLE = re.compile(r"^# .*(?=, packed by optimum-sab$)", re.MULTILINE)
_QWEN2_5_VL = "Qwen2_5_VL"  # how the names of its classes begin
_NO_PICTURES = ("text-generation", "automatic-speech-recognition", "audio-text-to-text")
_ROWS = 16  # of the table of blocks
_NOT_SETTINGS = (
    *("measured", "quant_method", "format_version", "calibration", "calibration_samples", "builtin_samples", "seed"),
    "dynamic",
)


def model_card(facts: ModelFacts, tags: Iterable[str] = ()) -> ModelCard:
    """The card, signed as ours. Where the checkpoint will lie is not known by then: `named` says it.

    Args:
        facts: of the model.
        tags: further ones.
    """
    card = ModelCard(f"---\n{card_data(facts).to_yaml()}\n---\n\n{_text(facts)}")
    return sign(with_tags(card, tags))


def named(card: ModelCard, repo_id: str) -> ModelCard:
    """A card of ours, of the checkpoint in a repository, whose name is its title where the base has none."""
    if card.data.base_model is None:
        title = f"# {plain(repo_id.split('/')[-1])}"
        card.text = _TITLE.sub(lambda _: title, card.text, count=1)
    card.text = card.text.replace(HERE, repo_id)
    return sign(card)


def card_data(facts: ModelFacts) -> ModelCardData:
    """The metadata: what the Hub files the model under."""
    base = (facts.config.measured or {}).get("base", {})
    of_base = {"base_model": base["model"], "base_model_relation": "quantized"} if "model" in base else {}
    licence = {key: base[key] for key in ("license", "license_name", "license_link") if key in base}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=["optimum-sab", "sab", "quantized", "binarization", f"{max(1, round(facts.bits_per_weight))}-bit"],
        **of_base,
        **licence,
    )


def _text(facts: ModelFacts) -> str:
    measured = facts.config.measured or {}
    parts = [
        _title(measured.get("base", {}), facts),
        _loading(facts),
        _sizes(facts),
        _agreement(measured),
        _calibration(facts),
        _errors(measured.get("block_errors") or []),
        _settings(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(base: Mapping[str, str], facts: ModelFacts) -> str:
    dense = f"a {facts.architecture}"
    if "model" in base:
        commit = f" at {code(base['revision'][:12])}" if "revision" in base else ""
        dense = f"{_link(base['model'])}{commit}"
    return (
        f"# {plain(base.get('model', facts.architecture).split('/')[-1])}, packed by optimum-sab\n\n"
        f"{dense[0].upper()}{dense[1:]} with its decoder's linears packed to {facts.bits_per_weight:.3f} bits per "
        "weight by optimum-sab: signs, and a few scales that are fitted to calibration data."
    )


def _link(model: str) -> str:
    """To a repository; what is none is named without one."""
    try:
        validate_repo_id(model)
    except ValueError:
        return code(model)
    return f"[{plain(model)}](https://huggingface.co/{model})"


def _loading(facts: ModelFacts) -> str:
    reader = "AutoTokenizer" if facts.pipeline_tag == "text-generation" else "AutoProcessor"
    lines = [
        "## Loading",
        "",
        "```bash",
        f"pip install optimum-sab  # {UNRELEASED}",
        "```",
        "",
        "```python",
        "import optimum_sab  # registers the quantization method with Transformers",
        f"from transformers import {', '.join(sorted((facts.auto_class, reader)))}",
        "",
        f'model = {facts.auto_class}.from_pretrained("{HERE}")',
        f'processor = {reader}.from_pretrained("{HERE}")',
        "```",
        "",
    ]
    lines += [*_asking(facts), *_torchvision(facts)]
    if facts.brings_code:
        lines.append(
            "`from_pretrained(…, trust_remote_code=True)` needs no import: it runs `configuration_sab.py` of this "
            "checkpoint, which imports the package, or says that it has to be installed."
        )
    else:
        lines.append(
            "`python -m optimum_sab run PROGRAM …` is for programs that do not import it, such as lm-eval or "
            "`transformers serve`."
        )
    lines += [
        "",
        "Without the package Transformers warns of an unknown quantization type and stops with a size mismatch. "
        "`model.dequantize()` gives a dense model for programs that read no packed weights, such as vLLM, SGLang and "
        "llama.cpp.",
    ]
    return "\n".join(lines)


def _asking(facts: ModelFacts) -> list[str]:
    """Code that asks about a picture, of models that answer such questions."""
    if facts.pipeline_tag != "image-text-to-text":
        return []
    return [
        "```python",
        'question = [{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is in the picture?"}]',
        'messages = [{"role": "user", "content": question}]',
        "inputs = processor.apply_chat_template(",
        '    messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True',
        ").to(model.device)",
        "answer = model.generate(**inputs, max_new_tokens=64)",
        'print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])',
        "```",
        "",
    ]


def _torchvision(facts: ModelFacts) -> list[str]:
    """What a processor of pictures needs, and for the family that has one without it, how to get that."""
    if facts.pipeline_tag in _NO_PICTURES:
        return []
    if not facts.architecture.startswith(_QWEN2_5_VL):
        return [f"Image processors of most families need torchvision: {TORCHVISION}.", ""]
    return [
        f"This processor needs torchvision: {TORCHVISION}. For pictures and text there is one without:",
        "",
        "```python",
        "from optimum_sab.hf.processor import load_processor",
        "",
        f'processor = load_processor("{HERE}")',
        "```",
        "",
    ]


def _sizes(facts: ModelFacts) -> str:
    rows = [
        (f"{facts.linears} packed linears, scales and biases included", facts.packed_bytes, facts.dense_bytes),
        (f"everything else, in {facts.dtype}", facts.other_bytes, facts.other_bytes),
        ("all tensors", facts.packed_bytes + facts.other_bytes, facts.dense_bytes + facts.other_bytes),
    ]
    return _table(
        "## Size", ("", "bytes", f"dense, in {facts.dtype}"), [(row, f"{a:,}", f"{b:,}") for row, a, b in rows]
    )


def _agreement(measured: Mapping[str, Any]) -> str:
    verdict, agreement = measured.get("verdict"), measured.get("agreement")
    head = "## Agreement with the dense model"
    parts = [] if verdict is None else [f"Verdict of the run that made it: **{plain(verdict['words'])}**."]
    if agreement:
        rows = [
            (plain(kind), _figure(each["kl"], "{:.3f}"), _figure(each["top1"], "{:.1%}"))
            for kind, each in agreement.items()
        ]
        parts.append(_rows(("", "KL, nats per token", "likeliest token the same"), rows))
        parts.append("On samples that did not calibrate it. It is a check, no benchmark.")
    return "\n\n".join([head, *parts]) if parts else ""


def _figure(value: float | None, form: str) -> str:
    return "no number" if value is None else form.format(value)


def _calibration(facts: ModelFacts) -> str:
    config, measured = facts.config, facts.config.measured or {}
    used = measured.get("calibration_samples", {})
    besides = f", and {config.builtin_samples:,} samples of the built-in set" if config.builtin_samples else ""
    rows: list[tuple[str, str]] = [("data", _source(config.calibration) + besides)]
    if used:
        rows.append(("samples", f"{used['samples']:,}, {used['with_pictures']:,} of them with pictures"))
    rows += [(f"tokens, {plain(kind)}", f"{count:,}") for kind, count in measured.get("calibration_tokens", {}).items()]
    rows += [("texts cut to", f"{config.sequence_length:,} tokens"), ("seed", str(config.seed))]
    return _table("## Calibration", ("", ""), rows)


def _source(calibration: Any) -> str:
    if calibration is None or calibration == "builtin":
        return "the built-in set of optimum-sab"
    if calibration == "self":
        return "written by the dense model itself"
    if isinstance(calibration, str):  # the folders of a file say nothing to others, but its name may
        return code(calibration) if names_dataset(calibration) else f"the file {code(os.path.basename(calibration))}"
    return "given as objects"


def _errors(blocks: Sequence[Sequence[Any]]) -> str:
    """Of the blocks, evenly spread where there are many."""
    if not blocks:
        return ""
    shown = spread(len(blocks), _ROWS)
    rows = [(str(i), *("" if each is None else f"{each:.4f}" for each in blocks[i])) for i in shown]
    table = _table("## Error by block", ("block", "outputs of its linears", "hidden states behind it"), rows)
    return f"{table}\n\nRelative squared error, on calibration data{_of_how_many(len(shown), len(blocks))}."


def _of_how_many(shown: int, blocks: int) -> str:
    return "" if shown == blocks else f"; {shown} of {blocks} blocks"


def _settings(facts: ModelFacts) -> str:
    config = facts.config
    head = f"## Settings\n\nFormat version {config.format_version}"
    given = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_SETTINGS}
    count = len(config.dynamic or ())
    rules = (
        f" `dynamic` has {counted(count, 'rule')} there: planes that were chosen by sensitivity, for a linear or for "
        "those that share an input, and rules that were given."
        if count
        else ""
    )
    if not given:
        return f"{head}, the defaults; they are in `quantization_config` of `config.json`.{rules}"
    shown = f"```json\n{json.dumps(given, indent=2)}\n```"
    return f"{head}; other than the defaults:\n\n{shown}\n\nAll are in `quantization_config` of `config.json`.{rules}"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"{title}\n\n{_rows(head, rows)}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])
