"""Assembles the reader: LLaVA's architecture around SmolLM2-135M-Instruct, with the vision part of this package.

The language weights are whoever evaluates' own and stay as they are, but for one row that is added to the embeddings:
the picture's placeholder, which is the mean of the others, so that it is never the likeliest next token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from optimum_sab.errors import ConfigError
from optimum_sab.eval.reader.tower import IMAGE_SIZE, PATCH_SIZE, TOKENS, tower_config
from optimum_sab.example.chatml import chat_template
from optimum_sab.example.processor import ProcessorClasses, special_token, write_json, write_processor_files
from optimum_sab.hf.output.place import check_output
from optimum_sab.hf.output.saving import written_whole
from optimum_sab.wording import page

WEIGHTS = Path(__file__).with_name("vision.safetensors")
IMAGE_TOKEN = "<image>"
MARK = "optimum_sab_reader"  # in config.json, by which `optimum_sab.eval` knows the checkpoint
RECIPE = f"{page('benchmarks')} says how to make the checkpoint of SmolLM2-135M-Instruct"
EMBEDDINGS = "model.embed_tokens.weight"
# Of the folder's tokens; Transformers' two lines name their classes and store roles differently, so they are read.
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def write_reader(
    language: Path | str, output: Path | str, vision: Path | str = WEIGHTS, overwrite: bool = False
) -> Path:
    """Write the complete checkpoint, loadable by the auto classes of every supported line of Transformers.

    Args:
        language: folder with the language model's config.json, safetensors and tokenizer.json.
        output: folder to write; it appears only when all of it is there.
        vision: the trained vision tower and connector.
        overwrite: whether to replace what is in `output`.

    Returns:
        `output`.

    Raises:
        ConfigError: the language model is missing, incomplete, not a Llama, or of another width than the connector.
        OutputExistsError: there are files in `output` and `overwrite` was not asked for.
        OutputError: `output` cannot be written to, or is where `language` is; see `check_output`.
    """
    language, output, vision = Path(language), Path(output), Path(vision)
    where = check_output(output, overwrite, sources=(language, vision))
    config = read_language_config(language)
    connector = _read_vision(vision)
    width = connector["multi_modal_projector.linear_2.weight"].shape[0]
    if config["hidden_size"] != width:
        raise ConfigError(
            f"{language} has hidden_size={config['hidden_size']}, but the reader's connector was trained for {width}; "
            f"{RECIPE}."
        )
    weights = read_language_weights(language)
    tokenizer, placeholder = _read_tokenizer(language)
    table = weights[EMBEDDINGS]
    if placeholder != len(table):
        raise ConfigError(
            f"the tokenizer of {language} has {placeholder} tokens and its embeddings {len(table)} rows; the reader "
            f"adds one token to as many; {RECIPE}."
        )
    weights = {f"language_model.{name}": tensor for name, tensor in _with_placeholder(weights).items()}
    weights.update({name: tensor.to(table.dtype) for name, tensor in connector.items()})
    ends: dict[str, Any] = {f"{role}_token_id": config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
    with written_whole(where) as partial:
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        write_json(partial / "config.json", reader_config(config, placeholder, table.dtype))
        write_json(partial / "generation_config.json", ends)
        _write_processor(partial, tokenizer, _roles(language))
    return output


def reader_config(language: dict[str, Any], placeholder: int, dtype: torch.dtype) -> dict[str, Any]:
    """The reader's config.json around the language model's own."""
    name = str(dtype).removeprefix("torch.")
    text = {**language, "vocab_size": placeholder + 1, "dtype": name}
    vision = {key: value for key, value in tower_config().to_dict().items() if value is not None}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        MARK: True,
        "dtype": name,
        "image_token_index": placeholder,
        "image_seq_length": TOKENS,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
        "text_config": text,
        "vision_config": {**vision, "dtype": name},
    }


def read_language_config(language: Path) -> dict[str, Any]:
    """The language model's config.json in the layout of Transformers 4, which 5 reads as well.

    Raises:
        ConfigError: there is none, or it is not a Llama's.
    """
    path = language / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {RECIPE}.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise ConfigError(f"{path} has model_type={config.get('model_type')!r} where 'llama' is needed; {RECIPE}.")
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    for name in ("architectures", "transformers_version", "_name_or_path", "_model_name_or_path", "torch_dtype"):
        config.pop(name, None)
    return dict(config)


def read_language_weights(language: Path) -> dict[str, Tensor]:
    """Every tensor of the language model, whether it is in one file or several.

    Raises:
        ConfigError: there are no safetensors in the folder, or no embeddings in them.
    """
    files = sorted(language.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{language} holds no safetensors; {RECIPE}.")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if EMBEDDINGS not in weights:
        raise ConfigError(f"the safetensors of {language} hold no {EMBEDDINGS!r}; {RECIPE}.")
    return weights


def _read_vision(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"the vision weights {path} are missing; install the package anew, or name a file.")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict


def _with_placeholder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The placeholder's row at the end of the embeddings, and of the head where it has its own."""
    for name in (EMBEDDINGS, "lm_head.weight"):
        if name in weights:
            mean = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
            weights = {**weights, name: torch.cat([weights[name], mean])}
    return weights


def _read_tokenizer(language: Path) -> tuple[Tokenizer, int]:
    """The tokenizer with the placeholder added, and the placeholder's id."""
    path = language / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {RECIPE}.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([special_token(IMAGE_TOKEN)])
    placeholder = tokenizer.get_vocab_size() - 1  # the last token added
    return tokenizer, placeholder


def _roles(language: Path) -> dict[str, str]:
    path = language / "tokenizer_config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {RECIPE}.")
    stored = json.loads(path.read_text(encoding="utf-8"))
    found = {role: stored.get(role) for role in ROLES}
    return {role: each["content"] if isinstance(each, dict) else each for role, each in found.items() if each}


def _write_processor(folder: Path, tokenizer: Tokenizer, roles: dict[str, str]) -> None:
    write_processor_files(
        folder,
        ProcessorClasses("LlavaProcessor", "PreTrainedTokenizerFast", "SiglipImageProcessor"),
        tokenizer,
        chat_template(f"{IMAGE_TOKEN}\n"),
        tokenizer_config={
            "model_max_length": 8192,
            "model_input_names": ["input_ids", "attention_mask"],  # Transformers 4 adds token types otherwise
            "clean_up_tokenization_spaces": False,
            **roles,
        },
        preprocessor_config={
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "resample": 3,  # bicubic
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "image_token": IMAGE_TOKEN,
        },
    )
